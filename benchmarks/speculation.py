"""What guessing ahead gives: tokens a second with a draft model, with prompt lookup and with neither.

Run: python benchmarks/speculation.py MODEL --draft DRAFT [--draft OTHER] [--tokens 4] [--repetitions 3]
`--dense FOLDER` first writes MODEL there in bfloat16, as the target of drafts that are the same model in fewer bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from octavo_engine.llm import LLM
from octavo_engine.loader.checkpoint import open_checkpoint
from octavo_engine.models.registry import find_architecture
from octavo_engine.quantize.layout import Layout
from octavo_engine.quantize.observed import ObservingLoader
from octavo_engine.quantize.scheme import EXACT
from octavo_engine.quantize.writer import output_tensors, write_checkpoint
from octavo_engine.sampling_params import SamplingParams

OPEN = [
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "How do I make tomato soup?",
    "Write a Python function that returns the median of a list.",
]
PASSAGE = (
    "The committee met on Tuesday to discuss the budget for the coming year. Three proposals were on the table. The "
    "first would raise the parking fee from two to three euros an hour; the second would close the library on Mondays; "
    "the third would postpone the new playground by eighteen months. After a long debate, the members voted nine to "
    "four in favour of the first."
)
CODE = (
    "def total(items):\n    result = 0\n    for item in items:\n        result = result + item.price * item.count\n"
    "    return result\n\ndef mean(items):\n    return total(items) / len(items)\n"
)
COPYING = [
    f"Repeat the following text, word for word:\n\n{PASSAGE}",
    f"Copy this text and change nothing but Tuesday to Friday:\n\n{PASSAGE}",
    f"Write this Python code again with the name `total` changed to `total_price`:\n\n{CODE}",
    f"Quote the first three sentences of this text exactly:\n\n{PASSAGE}",
]
KINDS = {"open questions": OPEN, "copying": COPYING}


@dataclass
class Variant:
    """One way to run the model, and what it did."""

    name: str
    llm: LLM
    rates: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    accepted: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)  # guesses, tokens, accepted
    answers: dict[tuple[str, int], list[list[int]]] = field(default_factory=dict)

    def run(self, kind: str, batch: int, max_tokens: int) -> None:
        """All prompts of a kind, `batch` of them at a time."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        prompts = [self._chat(text) for text in KINDS[kind]]
        before = self.llm.stats
        started = time.perf_counter()
        answers = []
        for first in range(0, len(prompts), batch):
            results = self.llm.generate(prompts[first : first + batch], sampling)
            answers += [result.outputs[0].token_ids for result in results]
        seconds = time.perf_counter() - started
        after = self.llm.stats
        key = (kind, batch)
        self.rates.setdefault(key, []).append(sum(map(len, answers)) / seconds)
        self.accepted[key] = (
            after.spec_drafts - before.spec_drafts,
            after.spec_draft_tokens - before.spec_draft_tokens,
            after.spec_accepted_tokens - before.spec_accepted_tokens,
        )
        self.answers[key] = answers

    def _chat(self, text: str) -> list[int]:
        rendered = self.llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return self.llm.tokenizer.encode(rendered, add_special_tokens=False)


def main() -> None:
    arguments = _arguments()
    model = arguments.model
    if arguments.dense:
        write_dense(Path(model), Path(arguments.dense))
        model = arguments.dense
    settings = {"num_kv_blocks": 512, "max_num_seqs": 8, "max_model_len": 1_024, "dtype": arguments.dtype}
    guessing = {**settings, "num_speculative_tokens": arguments.tokens}
    variants = [Variant("neither", LLM(model, **settings)), Variant("prompt lookup", LLM(model, **guessing))]
    variants += [
        Variant(f"draft: {Path(draft).name}", LLM(model, speculative_model=draft, **guessing))
        for draft in arguments.draft
    ]
    cases = [(kind, batch) for batch in (1, 4) for kind in KINDS]
    for repetition in range(arguments.repetitions + 1):
        for variant in variants:
            for kind, batch in cases:
                variant.run(kind, batch, arguments.max_tokens)
            if repetition == 0:  # the first warms up, and teaches the speculator
                variant.rates.clear()
    _print(variants, cases, arguments)


def write_dense(model: Path, folder: Path) -> None:
    """The same model with plain weights."""
    checkpoint = open_checkpoint(model)
    loader = ObservingLoader(checkpoint, torch.float32, torch.device("cpu"))
    architecture, kind = find_architecture(checkpoint.config)
    kind(kind.configure(checkpoint.config, architecture), loader, 512)
    tensors = output_tensors(checkpoint, loader, EXACT, Layout(lambda *_: {}, {}), torch.bfloat16)
    write_checkpoint(folder, tensors, checkpoint, {"torch_dtype": "bfloat16"})


def _print(variants: list[Variant], cases: list[tuple[str, int]], arguments: argparse.Namespace) -> None:
    print(f"{arguments.max_tokens} tokens for each of 4 prompts, at most {arguments.tokens} guessed, greedy; torch "
          f"{torch.__version__}, {variants[0].llm.model.backend}\n")  # fmt: skip
    print("| prompts | at a time | | tokens/s | ratio | accepted | accepted a guess | equal answers |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, batch in cases:
        plain = variants[0]
        for variant in variants:
            rate = statistics.median(variant.rates[kind, batch])
            ratios = [a / b for a, b in zip(variant.rates[kind, batch], plain.rates[kind, batch], strict=True)]
            guesses, tokens, accepted = variant.accepted[kind, batch]
            same = sum(a == b for a, b in zip(variant.answers[kind, batch], plain.answers[kind, batch], strict=True))
            shown = (f"{accepted / tokens:.0%}", f"{accepted / guesses:.2f}") if guesses else ("", "")
            print(f"| {kind} | {batch} | {variant.name} | {rate:.0f} | {statistics.median(ratios):.2f} | {shown[0]} | "
                  f"{shown[1]} | {same} of {len(KINDS[kind])} |")  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", action="append", default=[])
    parser.add_argument("--dense", help="a new folder for the model in bfloat16")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()

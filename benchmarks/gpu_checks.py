"""What an engine on a GPU must answer: steps launched ahead, adapters, host memory, ranks, and a real model.

    python benchmarks/gpu_checks.py [steps adapters host-memory ranks real-model] [--device cuda] [--model FILE.gguf]

    steps        launching steps ahead, CUDA graphs and batching change no token of a greedy answer
    adapters     each sequence of a mixed batch says what a model with its adapter merged says
    host-memory  sequences and prefixes that went to host memory and back change no token
    ranks        a communicator of one rank over NCCL (gloo on a CPU) reduces, broadcasts and gathers
    real-model   --model answers a question rightly, as it does on the CPU, and its tokens per second

All but the last use small random models in float32. Prints one line of JSON for each check as it ends; exits 1 if one
failed, 2 without the device. --device cpu runs the same checks without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from octavo_engine.llm import LLM
from octavo_engine.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
QUESTION = "What is the capital of France? Answer with one word."
ANSWER = "Paris"
STREAMS = (1, 8, 32)
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
RANK = 4

Found = dict[str, Any]


class CheckFailedError(Exception):
    """A check found something wrong; the message says what."""


def steps(device: str, folder: Path, model: str) -> Found:
    """Compare answers of four ways to run the same prompts."""
    _write_model(folder)
    prompts = _prompts(12)
    together = {mode: _answers(str(folder), device, prompts, async_scheduling=mode) for mode in ("off", "on")}
    _equal(together["off"], together["on"], "launched ahead", "one after the other")
    alone = _llm(str(folder), device)
    single = [_tokens(alone.generate([prompt], GREEDY))[0] for prompt in prompts[:4]]
    _equal(single, together["off"][:4], "alone", "in a batch")
    return {"sequences": len(prompts), "backend": alone.model.backend}


def adapters(device: str, folder: Path, model: str) -> Found:
    """Two adapters and the base in one batch, against models with each merged."""
    base = _write_model(folder / "base")
    for seed, name in enumerate(("a", "b"), start=1):
        _write_adapter(base, folder, name, seed)
    modules = {name: str(folder / f"adapter-{name}") for name in ("a", "b")}
    llm = _llm(str(folder / "base"), device, enable_lora=True, lora_modules=modules)
    prompts = _prompts(9)
    names = ["", "a", "b"] * 3
    mixed = _tokens(llm.generate(prompts, GREEDY, adapter=names))
    for name, path in (("", "base"), ("a", "merged-a"), ("b", "merged-b")):
        chosen = [index for index, each in enumerate(names) if each == name]
        wanted = _answers(str(folder / path), device, [prompts[index] for index in chosen])
        _equal([mixed[index] for index in chosen], wanted, f"adapter {name or 'none'}", "merged weights")
    return {"sequences": len(prompts), "backend": llm.model.backend}


def host_memory(device: str, folder: Path, model: str) -> Found:
    """Too few blocks for all sequences, every preempted one swapped; then prompts that return."""
    _write_model(folder)
    prompts = _prompts(8)
    wanted = _answers(str(folder), device, prompts)
    cramped = _llm(
        str(folder), device, num_kv_blocks=12, kv_host_memory_bytes=16 << 20, preemption_mode="swap", max_model_len=96
    )
    for turn in range(3):
        _equal(_tokens(cramped.generate(prompts, GREEDY)), wanted, f"turn {turn + 1} through host memory", "in memory")
    stats = cramped.stats
    if not stats.num_preemptions_by_swap or not stats.host_blocks_fetched:
        raise CheckFailedError(f"nothing went to host memory and back: {stats}")
    return {"swaps": stats.num_preemptions_by_swap, "fetched": stats.host_blocks_fetched}


def ranks(device: str, folder: Path, model: str) -> Found:
    """One member is all one GPU allows: it shows that the library starts, connects and ends."""
    from torch.distributed import HashStore

    from octavo_engine.parallel.communicator import Communicator

    backend = "nccl" if device == "cuda" else "gloo"
    group = Communicator(HashStore(), "check", 0, 1, backend, None if backend == "nccl" else "127.0.0.1")
    x = torch.arange(12.0, device=device).reshape(3, 4)
    for name, result in (("reduce", group.reduce(x.clone())), ("gather", group.gather_columns(x, 4))):
        if not torch.equal(result, x):
            raise CheckFailedError(f"{name} over {backend} changed what one rank has")
    group.broadcast(x)
    version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else ""
    return {"backend": backend, "version": version}


def real_model(device: str, folder: Path, model: str) -> Found:
    """The model's answer, the CPU's first tokens, and how fast."""
    if not model:
        raise CheckFailedError("--model names no GGUF file")
    dtype = "bfloat16" if device == "cuda" else "float32"
    llm = LLM(model, device=device, dtype=dtype, max_model_len=1_024)
    conversation = [{"role": "user", "content": QUESTION}]
    said = llm.chat([conversation], SamplingParams(max_tokens=16, temperature=0.0))[0].outputs[0].text
    if ANSWER not in said:
        raise CheckFailedError(f"to {QUESTION!r} it said {said!r}")
    prompt = llm.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 4, add_special_tokens=True)
    first = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    here = _tokens(llm.generate([prompt], first))
    reference = LLM(model, device="cpu", dtype="float32", max_model_len=1_024, num_kv_blocks=64)
    _equal(here, _tokens(reference.generate([prompt], first)), f"on {device}", "on the CPU in float32")
    rates = {}
    sampling = SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True)
    for count in STREAMS:
        varied = [[*prompt, 50 + index] for index in range(count)]
        llm.generate(varied, first)
        start = time.perf_counter()
        llm.generate(varied, sampling)
        rates[str(count)] = round(count * sampling.max_tokens / (time.perf_counter() - start))
    return {"said": said, "tokens_per_s": rates, "backend": llm.model.backend}


CHECKS: dict[str, Callable[[str, Path, str], Found]] = {
    "steps": steps,
    "adapters": adapters,
    "host-memory": host_memory,
    "ranks": ranks,
    "real-model": real_model,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; all if none is named")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="", help="GGUF file for real-model")
    arguments = parser.parse_args()
    if unknown := set(arguments.checks) - CHECKS.keys():
        parser.error(f"there is no check named {', '.join(sorted(unknown))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_checks: PyTorch finds no CUDA device; nothing was checked", file=sys.stderr)
        sys.exit(2)
    failed = 0
    for name in arguments.checks or CHECKS:
        start = time.perf_counter()
        result: Found = {"check": name, "device": arguments.device}
        try:
            with tempfile.TemporaryDirectory() as folder:
                result |= {"passed": True, **CHECKS[name](arguments.device, Path(folder), arguments.model)}
        except Exception as error:  # the next check still runs; the trace is printed
            traceback.print_exc()
            failed += 1
            result |= {"passed": False, "error": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({**result, "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    sys.exit(1 if failed else 0)


def _write_model(folder: Path) -> Any:
    """A Llama of two layers whose answers are far from ties, saved under `folder`."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=512, max_position_embeddings=512, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    _save(model, folder)
    return model


def _save(model: Any, folder: Path) -> None:
    """With a tokenizer of one word for each id."""
    from tokenizers import Tokenizer, models

    model.save_pretrained(folder)
    words = {f"<{index}>": index for index in range(model.config.vocab_size)}
    Tokenizer(models.WordLevel(vocab=words, unk_token="<0>")).save(str(folder / "tokenizer.json"))


def _write_adapter(base: Any, folder: Path, name: str, seed: int) -> None:
    """A random adapter in PEFT's layout, and the base with it merged."""
    import copy

    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    merged, tensors = copy.deepcopy(base), {}
    for layer in range(base.config.num_hidden_layers):
        for target in TARGETS:
            place = f"model.layers.{layer}.{target}"
            weight = merged.get_parameter(f"{place}.weight")
            a = torch.randn(RANK, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
            b = torch.randn(weight.shape[0], RANK, generator=generator) / RANK**0.5
            tensors[f"base_model.model.{place}.lora_A.weight"] = a
            tensors[f"base_model.model.{place}.lora_B.weight"] = b
            with torch.no_grad():
                weight.add_(2.0 * b @ a)
    path = folder / f"adapter-{name}"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}
    modules = [target.rpartition(".")[2] for target in TARGETS]
    (path / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": modules}))
    _save(merged, folder / f"merged-{name}")


def _prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(3, 512, (8 + 5 * index,), generator=generator).tolist() for index in range(count)]


def _llm(model: str, device: str, **settings: Any) -> LLM:
    known = {"dtype": "float32", "num_kv_blocks": 256, "max_model_len": 256, "max_num_seqs": 32}
    return LLM(model, device=device, **{**known, **settings})


def _answers(model: str, device: str, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    return _tokens(_llm(model, device, **settings).generate(prompts, GREEDY))


def _tokens(results: Any) -> list[list[int]]:
    failed = [result.outputs[0].finish_reason for result in results if result.outputs[0].finish_reason == "error"]
    if failed:
        raise CheckFailedError(f"{len(failed)} of {len(results)} requests failed")
    return [list(result.outputs[0].token_ids) for result in results]


def _equal(found: list[list[int]], wanted: list[list[int]], what: str, than: str) -> None:
    wrong = [index for index, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other]
    if wrong:
        index = wrong[0]
        raise CheckFailedError(
            f"{len(wrong)} of {len(wanted)} answers {what} differ from those {than}; "
            f"the first: {found[index]}, not {wanted[index]}"
        )


if __name__ == "__main__":
    main()

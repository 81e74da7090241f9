"""How a language model is asked whether a document answers a query (the prompt of Qwen3-Reranker's model card)."""

from __future__ import annotations

from octavo_engine.tokenizer.interface import Tokenizer

DEFAULT_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
_AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def judge_prompt(
    tokenizer: Tokenizer, query: str, document: str, instruction: str | None, max_length: int = 0
) -> list[int]:
    """Token ids after which the model says yes or no; the document is cut to keep to max_length, 0 cuts nothing."""
    question = f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}\n<Query>: {query}\n<Document>: {document}"
    before, middle, after = (tokenizer.encode(text, add_special_tokens=False) for text in (_BEFORE, question, _AFTER))
    if max_length:
        middle = middle[: max(0, max_length - len(before) - len(after))]
    return [*before, *middle, *after]

"""How text becomes tokens, alike in training and in serving.

Prompt and completion are joined as token ids, never as text: a tokenizer may merge across the seam, and the model
would then learn a sequence that serving never asks it to continue.
"""

from collections.abc import Sequence
from typing import Any

IGNORE = -100
_TURN = "<{role}>\n{content}\n"


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a bare prompt, with the tokenizer's own start token."""
    return list(tokenizer(prompt, add_special_tokens=True)["input_ids"])


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]], generate: bool = True) -> list[int]:
    """Token ids of a chat; with `generate`, up to where the assistant's next turn begins."""
    if getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=generate, tokenize=True, return_dict=True
        )["input_ids"]
        return list(ids)
    text = "".join(_TURN.format(**message) for message in messages) + ("<assistant>\n" if generate else "")
    return prompt_ids(tokenizer, text)


def example_ids(tokenizer: Any, content: dict[str, Any], max_length: int) -> tuple[list[int], list[int]]:
    """Token ids and labels (`IGNORE` where there is no loss) of an entry's content, cut at `max_length`.

    Loss is on completions, on the last assistant turn, or on the whole of a plain text; each ends with the
    end-of-sequence token, so that answers learned also end. A prompt that is too long loses its beginning, up to its
    first token; an answer or text that is too long loses its end.
    """
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "text" in content:
        ids = prompt_ids(tokenizer, content["text"]) + end
        start = 1 if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else 0
    else:
        if "messages" in content:
            messages = list(content["messages"])
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            head = chat_ids(tokenizer, messages[:last])
            text = messages[last]["content"]
        else:
            head = prompt_ids(tokenizer, content["prompt"])
            text = content["completion"]
        answer = list(tokenizer(text, add_special_tokens=False)["input_ids"]) + end
        room = max(1, max_length - len(answer))
        if len(head) > room:
            head = head[:1] + head[len(head) - room + 1 :]
        start = len(head)
        ids = head + answer
    ids = ids[:max_length]
    labels = [IGNORE if position < start else token for position, token in enumerate(ids)]
    return ids, labels

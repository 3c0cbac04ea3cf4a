"""What the ranks run in the tests of the generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.tokenizer.tokenizer import Tokenizer
from pipeline.inference import generate
from pipeline.inference.generate import Generator
from pipeline.inference.sampling import Sampling
from tests.distributed.grid import join

generate.initialize = join  # groups of an earlier case for the same layout


def texts(length: int = 211) -> list[str]:
    """Prompts that end anywhere in a segment of 16: in the first one, at a border, one after it, and far on."""
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(length))
    return [text[:5], text[3:19], text[:17], text[:97], text]


def greedy_and_recomputed(run: str, overrides: list[str], new_tokens: int) -> dict[str, Any]:
    """Greedy tokens of a batch, by steps as a GPU records them too, and those of forwards over all tokens so far,
    without any cache, one prompt each."""
    generator = Generator.open(run, overrides=overrides)
    generator.model.streamer.tokens_per_window = 64  # several windows per prompt
    found = generator.generate(texts(), max_new_tokens=new_tokens)
    generator.model.records = True
    recorded = generator.generate(texts(), max_new_tokens=new_tokens)
    expected, margins = [], []
    for text in texts():
        prompt, new = generator.tokenizer.encode(text), []
        while len(new) < new_tokens and generator.tokenizer.eos_id not in new:
            top = _last_logits(generator, prompt + new).topk(2)
            margins.append(float(top.values[0] - top.values[1]))
            new.append(int(top.indices[0]))
        expected.append(new)
    return {
        "found": [completion.tokens for completion in found],
        "recorded": [completion.tokens for completion in recorded],
        "expected": expected,
        "margin": min(margins),
    }


def _last_logits(generator: Generator, tokens: list[int]) -> torch.Tensor:
    """Logits after the last token, from one forward over all segments."""
    model = generator.model
    stage, length = model.stage, model.length
    segments = -(-len(tokens) // length)
    padded = torch.zeros(segments * length, dtype=torch.int64)
    padded[: len(tokens)] = torch.tensor(tokens)
    reset = torch.zeros(1, segments, dtype=torch.bool)
    reset[0, 0] = True
    normed: list[torch.Tensor] = []
    hook = stage.final_norm.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0]))
    inputs = padded.view(1, segments, length)
    with torch.no_grad():
        stage(inputs, stage.empty_memory(1, torch.device("cpu")), reset, torch.zeros_like(inputs))
    hook.remove()
    hidden = normed[0].transpose(0, 1).flatten(0, 1)[len(tokens) - 1]
    return stage.next_token_logits(hidden[None])[0, : model.vocab_size]


def completions(run: str, overrides: list[str]) -> dict[str, Any]:
    """Greedy and drawn tokens of a batch."""
    generator = Generator.open(run, overrides=overrides)
    state = generator.read(texts())
    drawn = Sampling(temperature=1.2, top_k=50, top_p=0.9)
    return {
        "greedy": [c.tokens for c in generator.complete(state, max_new_tokens=20)],
        "drawn": [c.tokens for c in generator.complete(state, max_new_tokens=20, sampling=drawn, seeds=7)],
    }


def alone(run: str) -> list[list[int]]:
    """The drawn tokens of `completions`, every prompt in a batch of its own."""
    generator = Generator.open(run)
    drawn = Sampling(temperature=1.2, top_k=50, top_p=0.9)
    results = [
        generator.generate([text], max_new_tokens=20, sampling=drawn, seeds=[7 + i]) for i, text in enumerate(texts())
    ]
    return [completion.tokens for (completion,) in results]


def save_document(run: str, overrides: list[str], path: str, document: list[str]) -> list[int]:
    """Read texts and keep them; returns their numbers of tokens."""
    generator = Generator.open(run, overrides=overrides)
    state = generator.read(document)
    generator.save(state, path)
    return state.tokens_read


def ask(run: str, overrides: list[str], path: str, questions: list[str]) -> list[list[int]]:
    """Greedy continuations of questions after what was kept; asked twice, to see that the state stays as it is."""
    generator = Generator.open(run, overrides=overrides)
    kept = generator.load(path)
    first, second = (generator.generate(questions, after=kept, max_new_tokens=12) for _ in range(2))
    assert [c.tokens for c in first] == [c.tokens for c in second]
    return [completion.tokens for completion in first]


def whole(run: str, prompts: list[str]) -> list[list[int]]:
    """Greedy continuations of whole texts."""
    return [completion.tokens for completion in Generator.open(run).generate(prompts, max_new_tokens=12)]


def ended(run: str) -> dict[str, Any]:
    """The ways in which a text ends."""
    generator = Generator.open(run)
    state = generator.read([texts()[3]])
    pieces: list[str] = []
    free = generator.complete(state, max_new_tokens=12, on_text=lambda lane, piece: pieces.append(piece))[0]
    stop = "".join(free.text[4:7])
    stopped = generator.complete(state, max_new_tokens=12, stop=["never", stop])[0]
    generator.tokenizer = Tokenizer("byte", eos_id=free.tokens[5])
    at_eos = generator.complete(state, max_new_tokens=12)[0]
    return {"free": free, "pieces": pieces, "stop": stop, "stopped": stopped, "at_eos": at_eos}


def from_file(run: str, path: str, block: int) -> tuple[list[int], list[int]]:
    """Tokens after a text from a file, read in blocks, and after the same text at once."""
    generator = Generator.open(run)
    generate.BLOCK_CHARACTERS = block
    (blockwise,) = generator.generate([Path(path)], max_new_tokens=12)
    (at_once,) = generator.generate([Path(path).read_bytes().decode()], max_new_tokens=12)
    return blockwise.tokens, at_once.tokens


def refusal(case: Callable[..., Any], **arguments: Any) -> str:
    """The message with which `case` refuses."""
    try:
        case(**arguments)
    except (ValueError, OSError) as error:
        return str(error)
    raise AssertionError("it was done")

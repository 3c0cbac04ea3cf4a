"""A real pretrained model, imported from its GGUF file, against transformers reading the same file."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.tokenizer.tokenizer import load_tokenizer
from tests.distributed import smollm2_cases
from tests.smollm2 import SEGMENT, gguf_file, real_text

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def smollm2(pools, tmp_path_factory):
    """Import folder, one segment of tokens and a label more, and transformers' logits for it."""
    file = gguf_file()
    out = tmp_path_factory.mktemp("smollm2") / "imported"
    pools.run(1, smollm2_cases.import_smollm2, source=str(file), out=str(out))
    tokens = load_tokenizer(out / "tokenizer").encode(real_text())[: SEGMENT + 1]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0]
    return out, tokens, logits


@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [
        (1, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_first_segment_of_real_text(pools, smollm2, tensor, pipeline):
    """Logits to 1e-4 and perplexity to four digits, in float32."""
    out, tokens, logits = smollm2
    ranks = pools.run(
        tensor * pipeline,
        smollm2_cases.first_segment,
        out=str(out),
        tokens=tokens,
        tensor=tensor,
        pipeline=pipeline,
    )
    parts = [rank for rank in ranks if rank is not None]
    found = np.concatenate([part["logits"] for part in parts], axis=-1)
    assert found.shape == (SEGMENT, 49152)
    assert np.abs(found - logits.numpy()).max() < 1e-4
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(tokens[1:])).exp()
    perplexity = math.exp(parts[0]["loss"].astype(np.float64).mean())
    assert perplexity == pytest.approx(float(expected), rel=5e-5)
    assert 1 < perplexity < 30  # a model that knows the language


def test_the_tokenizer_is_the_model_s(smollm2):
    out, tokens, _ = smollm2
    from transformers import AutoTokenizer

    file = gguf_file()
    theirs = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    assert theirs(real_text()[:2000], add_special_tokens=False).input_ids[:100] == tokens[:100]
    assert load_tokenizer(out / "tokenizer").eos_id == theirs.eos_token_id

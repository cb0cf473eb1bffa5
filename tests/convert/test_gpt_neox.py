"""Hugging Face folders of GPT-NeoX: read as transformers writes them, and what does not fit is named."""

import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from checkpoint_files import needs, official, random_params
from oracles import transformer as oracle
from small_models import SMALL, forward

import rwkv_jax
from rwkv_jax import inspect

CONFIG = SMALL["transformer"]
HEADS = CONFIG.num_heads
SETTINGS = {
    "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": 29, "hidden_size": 12, "hidden_act": "gelu",
    "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20, "max_position_embeddings": 24, "rotary_pct": 0.7,
    "rotary_emb_base": 10000, "layer_norm_eps": 1e-5, "use_parallel_residual": True, "tie_word_embeddings": False,
}  # fmt: skip
NEWER = {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.7, "rope_type": "default"}}
NAMES = {
    "ln1": "input_layernorm", "ln2": "post_attention_layernorm", "att.output": "attention.dense",
    "ffn.key": "mlp.dense_h_to_4h", "ffn.value": "mlp.dense_4h_to_h",
}  # fmt: skip


def as_transformers_has_it(weights):
    """Tensors under transformers' names, with the buffers of the Pythia releases."""
    tensors = {
        "gpt_neox.embed_in.weight": weights["emb.weight"],
        "embed_out.weight": weights["head.weight"],
        "gpt_neox.final_layer_norm.weight": weights["ln_out.weight"],
        "gpt_neox.final_layer_norm.bias": weights["ln_out.bias"],
    }
    for layer in range(CONFIG.num_layers):
        ours, theirs = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        for kind in ("weight", "bias"):
            for own, name in NAMES.items():
                tensors[f"{theirs}.{name}.{kind}"] = weights[f"{ours}.{own}.{kind}"]
            rows = []
            for head in range(HEADS):
                own = slice(head * CONFIG.head_dim, (head + 1) * CONFIG.head_dim)
                rows += [weights[f"{ours}.att.{name}.{kind}"][own] for name in ("query", "key", "value")]
            tensors[f"{theirs}.attention.query_key_value.{kind}"] = np.concatenate(rows)
        tensors[f"{theirs}.attention.bias"] = np.tril(np.ones((1, 1, 24, 24), bool))
        tensors[f"{theirs}.attention.masked_bias"] = np.array(-1e9, np.float32)
        tensors[f"{theirs}.attention.rotary_emb.inv_freq"] = np.array([1, 0.01], np.float32)
    return tensors


def write(folder, tensors, settings=SETTINGS):
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def weights():
    return official(random_params(CONFIG), CONFIG)


@pytest.mark.parametrize("form", ["one file", "shards", "newer settings"])
def test_a_folder_gives_the_logits_of_the_numpy_oracle(form, weights, tmp_path, x64):
    tensors, settings = as_transformers_has_it(weights), SETTINGS
    if form == "newer settings":
        settings = {k: v for k, v in SETTINGS.items() if not k.startswith("rotary")} | NEWER
    folder = write(tmp_path / "m", tensors, settings)
    if form == "shards":
        (folder / "model.safetensors").unlink()
        of = {key: f"{i % 2}.safetensors" for i, key in enumerate(tensors)}
        for part in set(of.values()):
            safetensors.numpy.save_file({k: v for k, v in tensors.items() if of[k] == part}, folder / part)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    params, config = rwkv_jax.load(folder, dtype="float64")
    assert config == CONFIG
    tokens = np.random.default_rng(0).integers(0, 29, 33)
    expected, _ = oracle.run(weights, tokens, head_dim=6, rotary_fraction=0.7, context_length=24)
    logits, _ = forward(params, config, tokens[None].astype(np.int32))
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=1e-9)


def test_a_saved_folder_has_the_tensors_and_settings_of_transformers(weights, tmp_path):
    rwkv_jax.save(tmp_path / "ours", *rwkv_jax.load(write(tmp_path / "m", as_transformers_has_it(weights))))
    found = safetensors.numpy.load_file(tmp_path / "ours/model.safetensors")
    buffers = (".attention.bias", "masked_bias", "inv_freq")
    expected = {k: v for k, v in as_transformers_has_it(weights).items() if not k.endswith(buffers)}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)
    assert SETTINGS.items() <= json.loads((tmp_path / "ours/config.json").read_text()).items()


def test_every_missing_extra_and_misshaped_tensor_is_listed(weights, tmp_path):
    tensors = as_transformers_has_it(weights)
    del tensors["embed_out.weight"], tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
    tensors["gpt_neox.layers.0.attention.dense.weight"] = np.zeros((12, 11), np.float32)
    tensors["gpt_neox.layers.0.attention.query_key_value.bias"] = np.zeros(35, np.float32)
    tensors["gpt_neox.other"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="not a whole transformer checkpoint") as error:
        rwkv_jax.load(write(tmp_path / "m", tensors))
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "extra: blocks.0.att.query_key_value.bias (35,)",
        "extra: other (3,)",
        "missing: blocks.0.att.key.bias (12,)",
        "missing: blocks.0.att.query.bias (12,)",
        "missing: blocks.0.att.value.bias (12,)",
        "missing: blocks.1.ffn.key.bias (20,)",
        "missing: head.weight (29, 12)",
        "shape: blocks.0.att.output.weight is (12, 11), expected (12, 12)",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, the tensors' 2"),
        ({"intermediate_size": 24}, r"blocks.0.ffn.key.weight is \(20, 12\), expected \(24, 12\)"),
        ({"layer_norm_eps": 1e-6}, "config.json: .*layer_norm_eps is 1e-06, not 1e-05"),
        ({"hidden_act": "gelu_new", "rotary_emb_base": 500}, "hidden_act is 'gelu_new', .*; rotary_emb_base is 500"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear', not 'default'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"num_attention_heads": 5}, "hidden_size 12 is no multiple of 5 attention heads"),
        ({"num_attention_heads": 0, "vocab_size": None}, "does not say vocab_size, num_attention_heads as positive"),
        ({"rotary_pct": 0.5}, "3 of the head's 6 channels"),
    ],
)
def test_settings_of_another_model_are_refused(change, message, weights, tmp_path):
    with pytest.raises(ValueError, match=message):
        rwkv_jax.load(write(tmp_path / "m", as_transformers_has_it(weights), SETTINGS | change))


def test_a_file_that_does_not_say_the_heads_is_refused_and_says_what_to_load(weights, tmp_path):
    folder = write(tmp_path / "m", as_transformers_has_it(weights))
    with pytest.raises(ValueError, match=r"GPT-NeoX's, whose heads only its config\.json says; load the folder"):
        rwkv_jax.load(folder / "model.safetensors")
    safetensors.numpy.save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="do not show its heads; load the Hugging Face folder"):
        rwkv_jax.load(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"a \.pth has no room for .* transformer"):
        rwkv_jax.save(tmp_path / "m.pth", *rwkv_jax.load(folder))


def test_inspect_describes_a_folder(weights, tmp_path):
    lines = inspect.describe(write(tmp_path / "m", as_transformers_has_it(weights))).splitlines()
    found = dict(line.split(maxsplit=1) for line in lines)
    assert (found["version"], found["format"]) == ("transformer", "Hugging Face folder, safetensors")
    assert (found["head_dim"], found["context_length"], found["rotary_fraction"]) == ("6", "24", "0.7")
    assert found["parameters"] == f"{rwkv_jax.count_params(CONFIG):,}"


THEIRS = """
import sys, numpy as np, torch, transformers
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
config = transformers.GPTNeoXConfig(
    vocab_size=97, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=200, max_position_embeddings=128,
    use_parallel_residual=sys.argv[1] == "parallel", initializer_range=0.3,
)
model = transformers.GPTNeoXForCausalLM(config).eval()
for parameter in model.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
model.save_pretrained(sys.argv[2])
"""
LOGITS = """
import sys, numpy as np, torch, transformers
torch.set_default_dtype(torch.float64)
model, report = transformers.GPTNeoXForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, dtype=torch.float64)
assert not report["missing_keys"] and not report["unexpected_keys"], report
with torch.no_grad():
    np.save(sys.argv[3], model.eval()(torch.tensor(np.load(sys.argv[2]))).logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("residual", ["parallel", "in turns"])
def test_transformers_computes_the_same_from_its_folder_and_from_ours(residual, tmp_path, x64):
    needs("torch", "transformers")
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    run_program(THEIRS, residual, theirs)
    params, config = rwkv_jax.load(theirs)
    assert config.parallel_residual == (residual == "parallel")
    rwkv_jax.save(ours, params, config)
    tokens = np.random.default_rng(0).integers(0, 97, (2, 100))
    np.save(tmp_path / "tokens.npy", tokens)
    logits, _ = forward(params, config, tokens.astype(np.int32))
    for folder in (theirs, ours):
        run_program(LOGITS, folder, tmp_path / "tokens.npy", tmp_path / "logits.npy")
        expected = np.load(tmp_path / "logits.npy")
        # Their angles are float32.
        assert np.linalg.norm(logits - expected) <= 2e-6 * np.linalg.norm(expected)
    assert params.emb.dtype == np.float64


def run_program(program, *arguments):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

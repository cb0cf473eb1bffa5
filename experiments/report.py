"""What a training run ends with: bits per byte beside compressors and the model tuned, a sample, and how to go on."""

import gzip
import json
import lzma
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import rwkv_jax
from rwkv_jax import checkpoint, config, distributed, generate, sharding, text, train

RESULT = "result.json"
"""In the run's folder: what it ended with, on all of the held-out text."""


def bits_per_byte(
    params: Any, start: Any, settings: config.Settings, stream: text.TokenStream, limit: int | None
) -> float:
    """Returns the code length of a held-out text, its separators included, in bits per byte of text.

    Args:
        params: The model's.
        start: The state of one row that rows start from; None is the zero state.
        settings: The run's.
        stream: The text.
        limit: Use only this many tokens of it, from the start; None: all.
    """
    data = settings.data
    batches = text.validation_batches(
        stream, context_length=data.context_length, batch_size=data.batch_size, limit=limit, documents=data.documents
    )
    packed = data.documents == "packed"
    cost = train.evaluate(params, settings.model, batches, settings.run.backend, start, packed=packed)
    return cost.nats / cost.num_tokens / math.log(2) * len(stream.tokens) / stream.num_bytes


def second_held_out(settings: config.Settings) -> text.TokenStream | None:
    """Returns the held-out text of finetune.compare_source, cut as by default; None where there is to be none."""
    source, path = settings.finetune.compare_source, settings.finetune.compare_path
    if source == "none":
        return None
    data = text.DataConfig(
        source=source, path=path, tokenizer=settings.data.tokenizer, tokenizer_file=settings.data.tokenizer_file,
        cache_dir=settings.data.cache_dir,
    )  # fmt: skip
    return text.load_streams(data).validation


def report(
    params: Any,
    start: Any,
    settings: config.Settings,
    streams: text.Streams,
    other: text.TokenStream | None,
    mesh: Mesh,
) -> None:
    """Writes the result, and prints it beside two compressors' and the model tuned, a sample, and how to go on; process 0 of several
    does.

    Args:
        params: The model's.
        start: The state of one row that rows start from; None is the zero state.
        settings: The run's.
        streams: Its text.
        other: The second held-out text of a fine-tuning run, if any.
        mesh: Of the run.
    """
    bits = bits_per_byte(params, start, settings, streams.validation, None)
    test_bits = None if streams.test is None else bits_per_byte(params, start, settings, streams.test, None)
    tuned = (
        []
        if settings.finetune.init_from is None
        else before_and_after(params, start, bits, settings, streams, other, mesh)
    )
    if not distributed.is_main():
        return
    result = {"held_out_bits_per_byte": bits, "held_out_bytes": streams.validation.num_bytes}
    if test_bits is not None and streams.test is not None:
        result |= {"test_bits_per_byte": test_bits, "test_bytes": streams.test.num_bytes}
    Path(settings.run.folder, RESULT).write_text(json.dumps(result) + "\n", encoding="utf-8")
    print(f"\nheld-out text, {streams.validation.num_bytes} bytes, bits per byte:")
    print(f"  {settings.model.architecture:8s} {bits:.4f}")
    if (raw := streams.validation_bytes()) is not None:
        print(f"  gzip -9  {8 * len(gzip.compress(raw, 9)) / len(raw):.4f}")
        print(f"  xz -9    {8 * len(lzma.compress(raw, preset=9)) / len(raw):.4f}")
    if test_bits is not None:
        print(f"\ntest text, bits per byte:\n  {settings.model.architecture:8s} {test_bits:.4f}")
    if tuned:
        print("\nheld-out text, bits per byte before and after fine-tuning:")
    for name, before, after in tuned:
        print(f"  {name:18s} {before:.4f} -> {after:.4f}")
    if start is not None and hasattr(start, "wkv"):
        path = Path(settings.run.folder, "state.safetensors")
        rwkv_jax.save_state(path, start, settings.model)
        print(f"\nthe learned state, for other programs: {path}")
    folder = settings.run.folder
    if jax.process_count() == 1 and settings.run.sample_tokens:
        print(f"\na sample, after {settings.run.prompt!r}:\n{settings.run.prompt}", end="")
        sampling = generate.Sampling(temperature=0.8, top_p=0.95)
        for piece in generate.stream(
            params,
            settings.model,
            streams.tokenizer,
            settings.run.prompt,
            max_tokens=settings.run.sample_tokens,
            sampling=sampling,
            state=start,
        ):
            print(piece, end="", flush=True)
        print()
    print(f"\nresume or repeat:  {shlex.join(['python', *sys.argv])}")
    generate_command = [
        "python",
        "experiments/generate.py",
        "--checkpoint",
        folder,
        "--prompt",
        settings.run.prompt,
    ]
    print(f"generate:          {shlex.join(generate_command)}")
    if Path(folder, "loss.png").exists():
        print(f"loss:              {Path(folder, 'loss.png')}")


def before_and_after(
    params: Any, start: Any, bits: float, settings: config.Settings, streams: text.Streams, other: text.TokenStream | None,
    mesh: Mesh,
) -> list[tuple[str, float, float]]:  # fmt: skip
    """Returns (text, bits per byte before, after) of a fine-tuning run; `bits` is what its own held-out text needs after it.

    Other args: as in `report`.
    """
    base = checkpoint.load_base(settings.run.folder, sharding.on(mesh))
    before = bits_per_byte(base, None, settings, streams.validation, None)
    rows = [(f"{settings.data.source}, tuned on", before, bits)]
    if other is not None:
        limit = settings.run.validation_tokens
        before, after = (bits_per_byte(*m, settings, other, limit) for m in ((base, None), (params, start)))
        rows.append((f"{settings.finetune.compare_source}, compared", before, after))
    return rows

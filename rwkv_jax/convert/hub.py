"""Models on the Hugging Face hub: hf://ORG/REPO[/FILE][@REVISION]."""

import re
from pathlib import Path
from typing import Any

_URL = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")
"""pathlib makes one slash of two."""
_WANTED = ["config.json", "*.safetensors", "*.safetensors.index.json"]
_TORCH_WANTED = ["config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"]
_MODEL_FILE = re.compile(r".*\.(safetensors|st|pth|bin)")


def locate(path: str | Path) -> Path:
    """Returns a path on this machine: the same one, or where huggingface_hub has put what an hf:// one names.

    Downloads are cached, and go on where they broke off; offline, the cache alone is used.

    Raises:
        ValueError: An hf:// path that is not of the form above.
        FileNotFoundError: There is no such file, or it is not in the cache and the hub cannot be reached.
        ImportError: huggingface_hub is not installed.
    """
    text = str(path)
    if not text.startswith("hf:/"):
        return Path(path)
    match = _URL.fullmatch(text.rstrip("/"))
    if match is None:
        raise ValueError(f"{text}: give hf://ORG/REPO, hf://ORG/REPO/FILE, or either with @REVISION")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ImportError(f'{text} needs huggingface_hub: pip install "rwkv-jax[hub]"') from None
    repo, file, revision = match["repo"], match["file"], match["revision"]
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repo, file, revision=revision))
        return _folder(hub, text, repo, revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(_missing(text, file, error)) from None
    except Exception as error:  # No network, or nothing there that is public; HTTP libraries have many words for it.
        raise FileNotFoundError(_missing(text, file, error)) from error


def pinned(path: str) -> str:
    """Returns an hf:// path with the commit that is cached here for it as its revision; any other path as it is."""
    if not path.startswith("hf:/"):
        return path
    parts = locate(path).parts
    commit = parts[len(parts) - parts[::-1].index("snapshots")]
    match = _URL.fullmatch(path.rstrip("/"))
    file = f"/{match['file']}" if match and match["file"] else ""
    return f"hf://{match['repo']}{file}@{commit}" if match else path


def _folder(hub: Any, text: str, repo: str, revision: str | None) -> Path:
    try:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception:  # Offline, in whichever words, or no such repository: what the cache has, if anything.
        folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        if "config.json" in files:
            return folder
    else:
        if "config.json" in files:
            wanted = _WANTED if any(name.endswith(".safetensors") for name in files) else _TORCH_WANTED
            return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=wanted))
    models = [name for name in files if _MODEL_FILE.fullmatch(name)]
    if len(models) != 1:
        raise FileNotFoundError(
            f"the repository has no config.json; name one of its files, such as {', '.join(models[:8]) or 'none'}: hf://{repo}/FILE"
        )
    return Path(hub.hf_hub_download(repo, models[0], revision=revision))


def _missing(text: str, file: str | None, error: Exception) -> str:
    what = f"{file} of it" if file else "it"
    return (
        f"{text}: could not get {what} ({str(error).strip() or type(error).__name__}); check the name and revision, or have a "
        "network once, after which it comes from the cache"
    )

"""Models on the Hugging Face hub: hf://ORG/REPO[/FILE][@REVISION]."""

import logging
import re
from pathlib import Path
from typing import Any

_URL = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?")
"""pathlib makes one slash of two."""
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(/|$)")
"""Where huggingface_hub keeps the files of a commit."""
_LOG = logging.getLogger(__name__)
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
    if not _is_hub(text):
        return Path(path)
    repo, file, revision = _parts(text)
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ImportError(f'{text} needs huggingface_hub: pip install "rwkv-jax[hub]"') from None
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repo, file, revision=revision))
        return _folder(hub, text, repo, revision)
    except FileNotFoundError as error:
        raise FileNotFoundError(_missing(text, file, error)) from None
    # No network, nothing there that is public, no room: huggingface_hub's versions stand on HTTP libraries with errors of their own.
    except Exception as error:
        raise FileNotFoundError(_missing(text, file, error)) from error


def commit_of(path: str) -> str | None:
    """Returns the commit that an hf:// path stands for now, having fetched it; None for any other path."""
    found = _SNAPSHOT.search(locate(path).as_posix()) if _is_hub(path) else None
    return found and found[1]


def at_commit(path: str, commit: str | None) -> str:
    """Returns an hf:// path with a commit for its revision; the path as it is where there is none."""
    if commit is None:
        return path
    repo, file, _ = _parts(path)
    return f"hf://{repo}/{file}@{commit}" if file else f"hf://{repo}@{commit}"


def _is_hub(path: str) -> bool:
    return path.startswith("hf:/")


def _parts(path: str) -> tuple[str, str | None, str | None]:
    """Repository, file and revision of an hf:// path."""
    match = _URL.fullmatch(path.rstrip("/"))
    if match is None:
        raise ValueError(f"{path}: give hf://ORG/REPO, hf://ORG/REPO/FILE, or either with @REVISION")
    return match["repo"], match["file"], match["revision"]


def _folder(hub: Any, text: str, repo: str, revision: str | None) -> Path:
    try:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # No answer, in the words of whichever HTTP library: what the cache has.
        if getattr(getattr(error, "response", None), "status_code", 500) < 500:
            raise  # An answer: not there, or not public.
        try:
            folder = Path(hub.snapshot_download(repo, revision=revision, local_files_only=True))
        except FileNotFoundError:
            raise error from None
        _LOG.warning(
            "%s: the hub gave no answer (%s); taking what is cached, %s", text, type(error).__name__, folder.name
        )
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

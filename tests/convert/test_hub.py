"""hf:// paths, with a hub that is not there."""

import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub as hub
import pytest
from checkpoint_files import assert_same_bits, random_params
from huggingface_hub import constants

import rwkv_jax
from rwkv_jax.convert.hub import at_commit, commit_of, locate

CONFIG = rwkv_jax.RWKV4Config(vocab_size=17, num_layers=2, embed_dim=6)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The offline mode of huggingface_hub and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached(cache, repo, revision="main"):
    """The folder where huggingface_hub looks for a repository's files at a revision."""
    folder, commit = cache / f"models--{repo.replace('/', '--')}", "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / revision).write_text(commit)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    return snapshot


def test_offline_a_cached_file_is_loaded(cache):
    params = random_params(CONFIG)
    rwkv_jax.save(cached(cache, "org/repo") / "model.safetensors", params, CONFIG)
    assert_same_bits(rwkv_jax.load("hf://org/repo/model.safetensors")[0], params)


def test_offline_a_cached_folder_is_loaded_at_its_revision(cache):
    params = random_params(CONFIG)
    snapshot = cached(cache, "org/repo", "v2")
    snapshot.rmdir()
    rwkv_jax.save(snapshot, params, CONFIG, "huggingface")
    assert_same_bits(rwkv_jax.load("hf://org/repo@v2")[0], params)
    with pytest.raises(FileNotFoundError, match="hf://org/repo@v3"):
        rwkv_jax.load("hf://org/repo@v3")


@pytest.mark.parametrize("path", ["hf://org/repo", "hf://org/repo/RWKV-x070.pth", "hf://org/repo/a/b.pth@main"])
def test_offline_what_is_missing_is_named(path, cache):
    with pytest.raises(FileNotFoundError) as error:
        rwkv_jax.load(path)
    assert str(error.value).startswith(f"{path}: could not get")
    assert "network" in str(error.value)


def test_a_path_of_pathlibs_means_the_same(cache):
    rwkv_jax.save(cached(cache, "org/repo") / "m.safetensors", random_params(CONFIG), CONFIG)
    assert locate(Path("hf://org/repo/m.safetensors")) == locate("hf://org/repo/m.safetensors")


@pytest.mark.parametrize("path", ["hf://", "hf://org", "hf://org/repo@", "hf://org@main/repo"])
def test_a_path_of_another_form_is_refused(path):
    with pytest.raises(ValueError, match="give hf://ORG/REPO"):
        rwkv_jax.load(path)


def test_online_file_and_revision_are_asked_for(tmp_path, monkeypatch):
    rwkv_jax.save(tmp_path / "m.safetensors", random_params(CONFIG), CONFIG)
    asked = []

    def download(repo, file, *, revision):
        asked.append((repo, file, revision))
        return str(tmp_path / "m.safetensors")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    rwkv_jax.load("hf://org/repo/folder/m.pth@abc")
    rwkv_jax.load("hf://org/repo/m.pth")
    assert asked == [("org/repo", "folder/m.pth", "abc"), ("org/repo", "m.pth", None)]


def test_online_only_the_files_of_a_model_are_asked_for(tmp_path, monkeypatch):
    rwkv_jax.save(tmp_path / "folder", random_params(CONFIG), CONFIG)
    listing = ["config.json", "model.safetensors", "pytorch_model.bin", "README.md"]
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, repo, revision: listing)
    patterns = []

    def snapshot(repo, *, revision, allow_patterns):
        patterns.extend(allow_patterns)
        return str(tmp_path / "folder")

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert rwkv_jax.load("hf://org/repo")[1] == CONFIG
    assert "config.json" in patterns and not any("bin" in pattern for pattern in patterns)


def test_without_an_answer_in_any_library_s_words_the_cache_is_used_and_that_is_said(cache, monkeypatch, caplog):
    class ConnectError(Exception):
        """What an HTTP library raises, which is no OSError."""

    def unreachable(self, repo, revision):
        raise ConnectError("no such name")

    monkeypatch.setattr(hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(FileNotFoundError, match="hf://org/repo: could not get it .no such name"):
        rwkv_jax.load("hf://org/repo")
    params, snapshot = random_params(CONFIG), cached(cache, "org/repo")
    snapshot.rmdir()
    rwkv_jax.save(snapshot, params, CONFIG, "huggingface")
    assert_same_bits(rwkv_jax.load("hf://org/repo")[0], params)
    assert f"the hub gave no answer (ConnectError); taking what is cached, {snapshot.name}" in caplog.text


def test_what_the_hub_answers_is_not_hidden_by_the_cache(cache, monkeypatch):
    class NotFoundError(OSError):
        response = SimpleNamespace(status_code=404)

    def gone(self, repo, revision):
        raise NotFoundError("404: it was taken down")

    monkeypatch.setattr(hub.HfApi, "list_repo_files", gone)
    snapshot = cached(cache, "org/repo")
    snapshot.rmdir()
    rwkv_jax.save(snapshot, random_params(CONFIG), CONFIG, "huggingface")
    with pytest.raises(FileNotFoundError, match="hf://org/repo: could not get it .404: it was taken down"):
        rwkv_jax.load("hf://org/repo")


def test_a_path_stands_for_the_commit_in_the_cache(cache):
    snapshot = cached(cache, "org/repo")
    rwkv_jax.save(snapshot / "m.safetensors", random_params(CONFIG), CONFIG)
    commit = commit_of("hf://org/repo/m.safetensors@main")
    assert commit == snapshot.name
    assert at_commit("hf://org/repo/m.safetensors@main", commit) == f"hf://org/repo/m.safetensors@{commit}"
    assert at_commit("hf://org/repo", commit) == f"hf://org/repo@{commit}"
    assert commit_of("runs/quickstart") is None and at_commit("runs/quickstart", None) == "runs/quickstart"


def test_a_repository_of_many_files_asks_for_one(monkeypatch):
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, repo, revision: ["a.pth", "b.pth", "README.md"])
    with pytest.raises(FileNotFoundError, match=r"name one of its files, such as a\.pth, b\.pth"):
        rwkv_jax.load("hf://org/repo")


def test_without_huggingface_hub_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"rwkv-jax\[hub\]"):
        rwkv_jax.load("hf://org/repo/file.pth")

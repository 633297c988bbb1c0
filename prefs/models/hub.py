"""Models of the hub: which commit a name means, and where its files are while there is no network.

Asked once a process, so that all jobs of a sweep have one model. What is pinned and in the cache is not asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from prefs.errors import UserError, first_line

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class HubModel:
    """A model's commit, and where its files are: a name of the hub, or, out of its reach, a folder of the cache."""

    commit: str
    path: str


@cache
def hub_model(path: str, revision: str | None) -> HubModel:
    """Look a model up by its name.

    Raises
    ------
    UserError
        If the hub has no such model, or is out of reach and the cache does not have it either.
    """
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    from prefs.data.hub import COMMIT, reachable

    pinned = COMMIT.fullmatch(revision or "")
    if pinned and isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        return HubModel(pinned[0], path)
    with quiet():
        if not reachable():
            return _cached(path, revision)
        try:
            config = hf_hub_download(path, "config.json", revision=revision)
        except errors.GatedRepoError:
            reason = "is gated: accept its terms on its page on the hub, and give your token as HF_TOKEN"
        except errors.RepositoryNotFoundError:
            reason = "is no folder here, and not on the hub or not for you to read; give HF_TOKEN if it is private"
        except errors.RevisionNotFoundError:
            reason = f"has no revision {revision} on the hub; check model.revision"
        except errors.EntryNotFoundError:
            reason = "has no config.json on the hub; it is no model of transformers"
        except (errors.HfHubHTTPError, OSError, ValueError) as error:
            reason = f"cannot be had from the hub: {first_line(error)}"
        else:
            return HubModel(Path(config).parent.name, path)
    raise UserError(f"model.path: {path} {reason}")


def to_load(path: str, revision: str | None) -> HubModel:
    """As `hub_model`, of one whose weights are wanted, which the cache may lack.

    Raises
    ------
    UserError
        As `hub_model` does, or if an adapter lies beside the weights.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from prefs.data.hub import reachable

    model = hub_model(path, revision)
    with quiet():
        if model.path == path and not reachable():
            model = _cached(path, model.commit)
        if model.path == path:
            try:
                hf_hub_download(path, ADAPTER, revision=model.commit)
            except EntryNotFoundError:
                return model
            raise with_adapter(path)
    return model


def with_adapter(path: str | Path) -> UserError:
    """The error of an adapter beside a whole model: transformers puts it on where `peft` is installed, and leaves it
    out where it is not."""
    return UserError(
        f"model.path: {path} holds an adapter ({ADAPTER}) beside a whole model, and could mean either; merge the"
        f" adapter into the weights, or give a folder without {ADAPTER}"
    )


def _cached(path: str, revision: str | None) -> HubModel:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        at = "" if revision is None else f" at {revision}"
        raise UserError(
            f"model.path: {path} is no folder here, the hub is out of reach, and its cache does not have it{at}"
        ) from None
    return HubModel(folder.name, str(folder))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what the library says of each try out of the log, which has it twice, since it also prints itself."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

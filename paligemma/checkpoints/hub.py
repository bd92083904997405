"""Checkpoints of the Hugging Face Hub: only the files that loading needs, and each refusal in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Callable
from glob import escape
from pathlib import Path

from ..config import PaliGemmaConfig, PaliGemmaError
from ..mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from .big_vision import find_npz
from .formats import ADAPTER_CONFIG_FILE, ADAPTER_FILE, CONFIG_FILE, INDEX_FILE, check_format, is_adapter
from .weights import Progress, ignore, weight_names

# Files of some kilobytes, which tell whether the others can be used.
DESCRIPTIONS = [CONFIG_FILE, "generation_config.json", ADAPTER_CONFIG_FILE, INDEX_FILE]


def download(
    repository: str, revision: str | None, progress: Progress, check: Callable[[PaliGemmaConfig], object] = ignore
) -> Path:
    """Fetch what a checkpoint, or an adapter of one, needs, with progress bars, unless it is in the cache already.

    Args:
        repository, revision: on the Hub.
        progress: see `Progress`.
        check: called with the config before weights are fetched, to refuse it.

    Raises:
        PaliGemmaError: the Hub cannot be reached or refuses, the files cannot be stored, or they are no checkpoint that
            this package reads, which is found before its weights are fetched.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm

    class ReportingBar(tqdm):
        """The Hub's own bar; the one that counts bytes reports as well."""

        def __init__(self, *args: object, unit: str = "it", initial: float = 0, **kwargs: object):
            super().__init__(*args, unit=unit, initial=initial, **kwargs)
            self.counts_bytes, self.done = unit == "B", initial  # by itself a bar that is not shown counts nothing

        def update(self, n: float | None = 1) -> bool | None:
            self.done += n or 0
            if self.counts_bytes and self.total:
                progress(f"Downloading {repository}", min(self.done / self.total, 1.0))
            return super().update(n)

    progress(f"Downloading {repository}", None)
    try:
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=DESCRIPTIONS))
        names = _names(repository, folder)
        check_format(repository, folder, names)
        wanted = [ADAPTER_FILE] if is_adapter(names) else _names_of_checkpoint(repository, folder, names, check)
        # The folder is named after its commit: what is fetched belongs together, and the cache can answer by itself.
        snapshot_download(repository, revision=folder.name, allow_patterns=wanted, tqdm_class=ReportingBar)
        return folder
    except (errors.HfHubHTTPError, errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise PaliGemmaError(_explain(error, repository, revision)) from error


def _names_of_checkpoint(
    repository: str, folder: Path, names: set[str], check: Callable[[PaliGemmaConfig], object]
) -> list[str]:
    """Patterns of the files to fetch beside the descriptions."""
    npz = find_npz(repository, names)
    if npz is None:
        check(PaliGemmaConfig.from_file(folder / CONFIG_FILE))
    weights = weight_names(folder, names) if npz is None else [npz]
    if missing := [name for name in weights if name not in names]:
        raise PaliGemmaError(f"{repository} lacks {missing[0]}, which its index lists; please choose another revision.")
    return ["tokenizer.json", *MASK_DECODER_FILES, *map(escape, weights)]


def _names(repository: str, folder: Path) -> set[str]:
    """All files of the revision whose snapshot is `folder`; those fetched before if the cache knows no others."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return {file.path for file in get_cached_repo_tree(repository, revision=folder.name)}
    except CachedRepoTreeNotFoundError:
        return {file.relative_to(folder).as_posix() for file in folder.rglob("*")}


def _explain(error: BaseException, repository: str, revision: str | None) -> str:
    """The sentence that says what is wrong and what to do."""
    from huggingface_hub import errors, get_token

    page, has_token = f"https://huggingface.co/{repository}", get_token() is not None
    is_nowhere = isinstance(error, errors.LocalEntryNotFoundError)
    if is_nowhere:  # raised also when the Hub did answer, but with an error, and the cache could not stand in for it
        error = error.__cause__ or error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.HFValidationError):
        return f"{repository} is no Hub id; please give one of the form owner/name."
    if isinstance(error, errors.GatedRepoError):
        account = "with the account that your HF_TOKEN belongs to"
        advice = account if has_token else "and set HF_TOKEN to a token of your account"
        return f"{repository} is a gated repository; please accept its license at {page} {advice}."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository} has no revision {revision}; please check {page}/tree/main."
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 401 and not has_token):
        private = "that your HF_TOKEN may read it"
        advice = private if has_token else "if it is a private one, set HF_TOKEN to a token that may read it"
        return f"The Hub knows no repository {repository}; please check the name, and {advice}."
    if status == 401:
        return "The Hub does not accept your HF_TOKEN; please make a new one."
    if status == 403:
        return f"The Hub forbids reading {repository}; please set HF_TOKEN to a token that may read gated repositories."
    if status is not None:
        return f"The Hub answered {status} for {repository}; please try again later."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repository} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it; please unset that."
    if is_nowhere:
        return f"{repository} is not in the local cache and the Hub cannot be reached; please check the network."
    reason = str(error).partition("\n")[0].rstrip(".")
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        return f"{repository} cannot be stored ({reason}); please set HF_HOME to a place with space for it."
    return f"{repository} could not be downloaded ({reason}); please try again."

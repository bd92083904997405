"""Checkpoints of the Hugging Face Hub: fetched once, refused with a sentence that says what to do."""

from __future__ import annotations

from pathlib import Path

from ..config import PaliGemmaError
from ..mask_decoder import FILE_NAMES as MASK_DECODER_FILES
from .weights import INDEX_FILE, Progress

HUB_FILES = [
    "config.json",
    "tokenizer.json",
    INDEX_FILE,
    "model.safetensors",
    "model-*-of-*.safetensors",
    *MASK_DECODER_FILES,
]


def download(repository: str, revision: str | None, progress: Progress) -> Path:
    """Fetch what a checkpoint needs from the Hub, with progress bars, unless it is in the cache already."""
    from huggingface_hub import errors, get_token, snapshot_download
    from huggingface_hub.utils import tqdm

    class ReportingBar(tqdm):
        """The Hub's own bar; the one that counts bytes reports as well."""

        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, **kwargs)
            # A bar that is not shown counts nothing, and knows no unit.
            self.counts_bytes, self.done = kwargs.get("unit") == "B", kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.done += n or 0
            if self.counts_bytes and self.total:
                progress(f"Downloading {repository}", min(self.done / self.total, 1.0))
            return super().update(n)

    progress(f"Downloading {repository}", None)
    page = f"https://huggingface.co/{repository}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES, tqdm_class=ReportingBar))
    except errors.GatedRepoError as error:
        if get_token() is None:
            advice = f"accept its licence at {page} and set HF_TOKEN to a token of your account"
        else:
            advice = f"accept its licence at {page} with the account that your HF_TOKEN belongs to"
        raise PaliGemmaError(f"{repository} is a gated repository; please {advice}.") from error
    except errors.RevisionNotFoundError as error:
        raise PaliGemmaError(f"{repository} has no revision {revision}; please check {page}/tree/main.") from error
    except errors.RepositoryNotFoundError as error:
        if get_token() is None:
            advice = "check the name, and if it is a private one, set HF_TOKEN to a token that may read it"
        else:
            advice = "check the name, and that your HF_TOKEN may read it"
        raise PaliGemmaError(f"The Hub knows no repository {repository}; please {advice}.") from error
    except errors.HFValidationError as error:
        raise PaliGemmaError(f"{repository} is no Hub id; please give one of the form owner/name.") from error
    except errors.LocalEntryNotFoundError as error:
        # Raised too when the Hub did answer, but with an error, and the cache could not stand in for it.
        if isinstance(error.__cause__, errors.HfHubHTTPError):
            raise _bad_answer(repository, error.__cause__.response.status_code) from error
        raise PaliGemmaError(
            f"{repository} is not in the local cache and the Hub cannot be reached; please check the network."
        ) from error
    except errors.HfHubHTTPError as error:
        raise _bad_answer(repository, error.response.status_code) from error
    except (errors.HTTPError, OSError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise PaliGemmaError(f"{repository} could not be downloaded ({reason}); please try again.") from error


def _bad_answer(repository: str, status: int) -> PaliGemmaError:
    if status == 401:
        return PaliGemmaError("The Hub does not accept your HF_TOKEN; please make a new one.")
    if status == 403:
        return PaliGemmaError(
            f"The Hub forbids reading {repository}; please set HF_TOKEN to a token that may read gated repositories."
        )
    return PaliGemmaError(f"The Hub answered {status} for {repository}; please try again later.")

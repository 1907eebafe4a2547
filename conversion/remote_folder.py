"""Folders elsewhere, by their address: whatever fsspec knows, as gs:// for Google Cloud Storage."""

from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.callbacks import TqdmCallback
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

GOOGLE = ("gs://", "gcs://")


def open_folder(address: str, project: str | None = None) -> tuple[AbstractFileSystem, str, bool]:
    """The file system of a folder, the folder's path in it, and whether that is on this machine.

    Args:
        address: a path, or an address as gs://bucket/path.
        project: that pays for reading a requester-pays bucket of Google Cloud Storage.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: the package for this kind of address is not installed.
        OSError: the address cannot be reached.
        ValueError: `project` for an address that is not Google's, or an unknown kind of address.
    """
    if project is not None and not address.startswith(GOOGLE):
        raise ValueError(f"project={project!r}: only a gs:// address is read on a project's account; leave it out")
    if "://" not in address:
        return LocalFileSystem(), str(Path(address).expanduser().absolute()), True
    scheme = address.split("://")[0]
    try:
        filesystem, path = url_to_fs(address, **({"requester_pays": project} if project else {}))
    except ImportError as error:
        package = "pip install gcsfs" if address.startswith(GOOGLE) else f"install what fsspec needs for {scheme}"
        raise ImportError(f"{address}: {error}: {package}, or download the folder and give its path") from error
    except ValueError as error:
        raise ValueError(f"{address}: {error}; give a path, or an address as gs://bucket/path") from error
    except Exception as error:  # a file system that asks for credentials at once, in words of its own
        raise _unreachable(address, error) from error
    try:
        found = filesystem.isdir(path) or filesystem.exists(path)
        if found:
            filesystem.ls(path)
    except Exception as error:  # every file system has errors of its own
        raise _unreachable(address, error) from error
    if not found:
        raise _unreachable(address, FileNotFoundError("no such folder, or no permission to see it"))
    return filesystem, path, isinstance(filesystem, LocalFileSystem)


def download(filesystem: AbstractFileSystem, path: str, folder: Path) -> Path:
    """Copy a folder to this machine, with a progress bar over its files.

    Returns:
        `folder`, which is made.

    Raises:
        OSError: a file cannot be read.
    """
    callback = TqdmCallback(tqdm_kwargs={"desc": "Downloading", "unit": " files"})
    try:
        filesystem.get(f"{path}/", f"{folder}/", recursive=True, callback=callback)
    except Exception as error:
        raise _unreachable(path, error) from error
    return folder


def _unreachable(address: str, error: Exception) -> OSError:
    advice = "check the address and the network, or download the folder and give its path"
    if address.startswith(GOOGLE):
        advice = (
            "the bucket may be requester-pays: log in (gcloud auth application-default login) and name the project "
            "that pays with --project; or download the folder (gcloud storage cp --billing-project) and give its path"
        )
    return OSError(f"{address}: cannot be read ({type(error).__name__}: {error}); {advice}")

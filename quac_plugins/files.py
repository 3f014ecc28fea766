"""The earlier place of :mod:`quac_plugins.core.files`."""

from quac_plugins.core.deprecated import moved

_NAMES = ("copy_files", "disk_errors", "read_json", "same_file", "write_file")
__getattr__ = moved(__name__, **dict.fromkeys(_NAMES, "quac_plugins.core.files"))

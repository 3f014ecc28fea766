"""The earlier place of :mod:`quac_plugins.images`."""

from quac_plugins.core.deprecated import moved

__getattr__ = moved(
    __name__, **dict.fromkeys(("OUTPUTS", "Picture", "give_back", "pictures_of"), "quac_plugins.images")
)

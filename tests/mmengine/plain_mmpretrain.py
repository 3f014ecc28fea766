"""mmpretrain without its language models: transformers is here for pyiqa, in a version that they do not know."""

import mmpretrain.utils.dependency

mmpretrain.utils.dependency.WITH_MULTIMODAL = False

import mmpretrain.models  # noqa: E402

import quac_plugins.mmengine  # noqa: E402, F401

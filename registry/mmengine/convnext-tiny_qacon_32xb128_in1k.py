# Q-ACON in any registered backbone
_base_ = "mmpretrain::convnext/convnext-tiny_32xb128_in1k.py"
custom_imports = dict(imports=["quac_plugins.mmengine"], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type="QuACBackbone",
        backbone=dict(type="ConvNeXt", arch="tiny", drop_path_rate=0.1),
        quac=dict(where="auto", quality="brisque"),
    )
)

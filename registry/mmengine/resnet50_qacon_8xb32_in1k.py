# Q-ACON in mmpretrain's ResNet-50
_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
custom_imports = dict(imports=["quac_plugins.mmengine"], allow_failed_imports=False)
model = dict(backbone=dict(type="QuACResNet", quac=dict(where="spatial", quality="brisque")))

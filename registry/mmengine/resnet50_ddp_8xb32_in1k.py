# A degradation prior in a frozen ResNet-50, fitted on a few photographs when the weights have been loaded:
# mim test mmpretrain FILE --checkpoint CHECKPOINT --cfg-options custom_hooks.0.data=few/
_base_ = "mmpretrain::resnet/resnet50_8xb32_in1k.py"
custom_imports = dict(imports=["quac_plugins.mmengine"], allow_failed_imports=False)
model = dict(backbone=dict(type="QuACResNet", prior=dict(site="stages")))
custom_hooks = [dict(type="FitPriorHook", data="few/", limit=10, corruptions=["fog"], severities=3)]

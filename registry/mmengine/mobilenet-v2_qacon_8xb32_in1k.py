# Q-ACON as the activation that every layer of the network is built with
_base_ = "mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py"
custom_imports = dict(imports=["quac_plugins.mmengine"], allow_failed_imports=False)
model = dict(backbone=dict(act_cfg=dict(type="QACON", quality="brisque", host=dict(type="ReLU6"))))

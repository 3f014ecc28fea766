# Training on degraded pictures, judged under all 15 corruptions of ImageNet-C at severity 3
_base_ = "./resnet50_qacon_8xb32_in1k.py"
train_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type="LoadImageFromFile"),
            dict(type="RandomResizedCrop", scale=224),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="CorruptImage", corruptions="all", prob=0.5),
            dict(type="PackInputs"),
        ]
    )
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type="CorruptedDataset",
        corruptions="all",
        severities=[3],
        dataset=dict(
            type="ImageNet",
            data_root="data/imagenet",
            split="val",
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="ResizeEdge", scale=256, edge="short"),
                dict(type="CenterCrop", crop_size=224),
                dict(type="CorruptImage"),
                dict(type="PackInputs", meta_keys=("sample_idx", "img_path", "corruption", "severity")),
            ],
        ),
    )
)
val_evaluator = dict(_delete_=True, type="CorruptionAccuracy")
test_dataloader = val_dataloader
test_evaluator = val_evaluator

from quac_plugins.core.quality.table import quality_function
@quality_function("brisque", channels=36)
def brisque(images):
    return images.mean(dim=(1,2,3))[:, None].expand(-1, 36).float()

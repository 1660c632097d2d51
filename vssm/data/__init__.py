"""Images to train and evaluate on: folders, tar files, Hugging Face data sets, and digits that are always at hand."""

from vssm.data.digits import open_digits
from vssm.data.images import LabelledImages
from vssm.data.sources import DataOptions, Split, data_id, open_dataset, open_images

__all__ = ["DataOptions", "LabelledImages", "Split", "data_id", "open_dataset", "open_digits", "open_images"]

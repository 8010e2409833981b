"""DICOM files of the tests, drawn and not taken from anyone."""

from io import BytesIO

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, JPEGBaseline8Bit

# What must come out nowhere.
PATIENT = {
    "PatientName": "SECRET^NAME",
    "PatientID": "SECRET-ID",
    "PatientBirthDate": "19500101",
    "PatientSex": "F",
    "PatientAge": "070Y",
    "InstitutionName": "SECRET HOSPITAL",
}


def dicom_dataset(pixels: np.ndarray, **tags: object) -> Dataset:
    """A radiograph of a chest with the given stored values, uncompressed."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = "1.2.3.4"
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = (
        ComputedRadiographyImageStorage
    )
    bits = 8 * pixels.itemsize
    values = {
        "Modality": "CR",
        "BodyPartExamined": "CHEST",
        "SamplesPerPixel": 1 if pixels.ndim == 2 else 3,
        "PhotometricInterpretation": "MONOCHROME2" if pixels.ndim == 2 else "RGB",
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelData": pixels.tobytes(),
        **({"PlanarConfiguration": 0} if pixels.ndim == 3 else {}),
        **PATIENT,
        **tags,
    }
    for keyword, value in values.items():
        if value is not None:
            setattr(dataset, keyword, value)
    dataset["PixelData"].VR = "OW"
    return dataset


def dicom_file(dataset: Dataset) -> bytes:
    """The dataset as a file."""
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def dicom_bytes(pixels: np.ndarray, **tags: object) -> bytes:
    """A radiograph of a chest as a file; a tag of None is left out."""
    return dicom_file(dicom_dataset(pixels, **tags))


def as_jpeg(dataset: Dataset, pixels: np.ndarray) -> Dataset:
    """The dataset with its pixels as JPEG Baseline."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=98)
    dataset.PixelData = encapsulate([buffer.getvalue()])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return dataset

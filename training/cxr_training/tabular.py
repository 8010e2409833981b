"""Age, sex and view as numbers: an ablation that shows what they give away.

Serving has an image and nothing else, so that a model with these inputs cannot be exported. They
are here to be measured: who is X-rayed lying down is ill already, and a collection's age range is a
mark of the collection.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd

_VIEWS = ("PA", "AP", "AP Supine")
_MIDDLE_AGE = 50.0


def tabular_inputs(frame: pd.DataFrame) -> npt.NDArray[np.float32]:
    """Age, sex and view of a manifest's images.

    Args:
        frame: a manifest.

    Returns:
        float32 `[images, 9]`: age in centuries (0.5 where unknown) and whether it is unknown; 1
        for female, for male, and for each of the views PA, AP and AP supine, else 0; whether sex,
        and view, is unknown or another.
    """
    age = pd.to_numeric(frame["age"], errors="coerce")
    columns = [age.fillna(_MIDDLE_AGE) / 100, age.isna()]
    for name, values in (("sex", ("F", "M")), ("view", _VIEWS)):
        columns += [frame[name] == value for value in values]
        columns.append(~frame[name].isin(values))
    return np.stack([column.to_numpy(dtype=np.float32) for column in columns], axis=1)

"""Take a finished student elsewhere: torch.export, ONNX or a MONAI bundle, checked before it is kept."""

from __future__ import annotations

from ._export import FORMATS as FORMATS
from ._export import ParityError as ParityError
from ._export import export_student as export_student
from ._module import ExportedStudent as ExportedStudent

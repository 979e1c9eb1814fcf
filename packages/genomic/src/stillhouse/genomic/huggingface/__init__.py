"""Students as models of transformers: importing this module registers them with the Auto classes.

    import stillhouse.genomic.huggingface
    from transformers import AutoModel, AutoModelForMaskedLM

    model = AutoModel.from_pretrained("student")             # a folder that `save_student` wrote
    features = model(ids, attention_mask=mask).last_hidden_state

No remote code runs. `save_student` and `load_student` are those of `stillhouse.genomic.student.store`, which
does without transformers and is quicker to import.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from ..student.store import Loaded as Loaded
from ..student.store import load_student as load_student
from ..student.store import save_student as save_student
from ._model import StudentForMaskedLM as StudentForMaskedLM
from ._model import StudentHFConfig as StudentHFConfig
from ._model import StudentModel as StudentModel

AutoConfig.register(StudentHFConfig.model_type, StudentHFConfig, exist_ok=True)
AutoModel.register(StudentHFConfig, StudentModel, exist_ok=True)
AutoModelForMaskedLM.register(StudentHFConfig, StudentForMaskedLM, exist_ok=True)

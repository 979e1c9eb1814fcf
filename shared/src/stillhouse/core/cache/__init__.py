"""Teacher outputs on disk: computed once, checked on every load, read by memory map.

spec = CacheSpec(
    kind="topk", teacher="qwen2.5-7b", teacher_hash=weight_hash(teacher), vocabulary_hash=digest,
    vocab=151_665, k=64, temperatures=(1.0, 2.0), preprocessing_hash=settings_hash({"crop": 224}),
)
with TeacherCache.create("cache", spec) as writer:
    for ids, inputs in batches:
        if writer.missing(ids):                    # all of them, or those that a killed run left
            writer.add(ids, teacher.signal(inputs))
    writer.finish()

cache = TeacherCache.open("cache", expect=spec)    # another teacher, vocabulary or k: an error naming both
signal = cache.lookup(["img_7", "img_3"]).signal   # SparseTeacher with rows in the order asked for
"""

from __future__ import annotations

from ._cache import Lookup as Lookup
from ._cache import TeacherCache as TeacherCache
from ._ids import SampleId as SampleId
from ._ids import settings_hash as settings_hash
from ._ids import vocabulary_hash as vocabulary_hash
from ._spec import SCHEMA as SCHEMA
from ._spec import CacheSpec as CacheSpec
from ._verify import cache_info as cache_info
from ._verify import verify_cache as verify_cache
from ._writer import CacheWriter as CacheWriter
from ._writer import fill as fill

"""All methods by the names that recipes use."""

from __future__ import annotations

from tensorpress.compressors.base import Compressor
from tensorpress.compressors.decompose.factorize import Factorize
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.compressors.decompose.mpoe import MPOE
from tensorpress.compressors.decompose.share import Share
from tensorpress.compressors.prune.finercut import FinerCut
from tensorpress.compressors.quantize.gptq import GPTQ
from tensorpress.compressors.recover.distill import Distill
from tensorpress.compressors.recover.lpa import LPA
from tensorpress.compressors.recover.mpo_tune import MPOTune
from tensorpress.compressors.recover.overparameterize import Overparameterize
from tensorpress.compressors.recover.pela import PELA
from tensorpress.compressors.recover.squeeze import Squeeze

METHODS: dict[str, type[Compressor]] = {
    "mpo": MPO,
    "factorize": Factorize,
    "finercut": FinerCut,
    "distill": Distill,
    "mpo_tune": MPOTune,
    "squeeze": Squeeze,
    "share": Share,
    "mpoe": MPOE,
    "lpa": LPA,
    "pela": PELA,
    "overparameterize": Overparameterize,
    "gptq": GPTQ,
}

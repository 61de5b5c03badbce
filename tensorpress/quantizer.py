"""The transformers plug-in: `from_pretrained` opens any artifact, and plain GPTQ folders without gptqmodel."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import GPTQConfig, QuantizationConfigMixin

from tensorpress.loading import FORMAT_VERSION, METHOD, apply_layers, artifact_config, check_version, gptq_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TensorpressConfig(QuantizationConfigMixin):
    """The `quantization_config` of an artifact: which module stands at which path."""

    def __init__(self, layers: dict[str, dict] | None = None, format_version: int = FORMAT_VERSION, **kwargs: Any):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.layers = layers or {}

    def to_dict(self) -> dict[str, Any]:
        return artifact_config(self.layers) | {"format_version": self.format_version}


class TensorpressQuantizer(HfQuantizer):
    """Rebuilds an artifact's modules on the meta device; transformers then reads the weights into them."""

    quantization_config: TensorpressConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        check_version(self.quantization_config.format_version)
        apply_layers(model, self.quantization_config.layers)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class PlainGPTQConfig(GPTQConfig):
    """GPTQConfig that does not ask for optimum, which only its own quantizer needs."""

    def post_init(self) -> None:
        listed, self.modules_in_block_to_quantize = self.modules_in_block_to_quantize, None
        super().post_init()
        self.modules_in_block_to_quantize = listed


class PlainGPTQQuantizer(HfQuantizer):
    """Opens a folder in the standard GPTQ layout with tensorpress's own layers; gptqmodel is not needed."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config.to_dict()
        apply_layers(model, gptq_layers(model, config, [Path(f) for f in checkpoint_files or []]))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make transformers know artifacts, and plain GPTQ folders where gptqmodel is not installed. Safe to call twice."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(TensorpressConfig)
        register_quantizer(METHOD)(TensorpressQuantizer)
    if importlib.util.find_spec("gptqmodel") is None:
        AUTO_QUANTIZER_MAPPING["gptq"] = PlainGPTQQuantizer
        AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = PlainGPTQConfig


register()

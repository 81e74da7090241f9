"""Architecture name in a checkpoint -> the class that runs it."""

from __future__ import annotations

from octavo_engine.errors import ModelLoadError
from octavo_engine.models.bert import BertModel, RobertaModel
from octavo_engine.models.classification import SUFFIX
from octavo_engine.models.deepseek import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM
from octavo_engine.models.gemma import Gemma2ForCausalLM, Gemma3ForCausalLM
from octavo_engine.models.gpt_oss import GptOssForCausalLM
from octavo_engine.models.interface import Model
from octavo_engine.models.llama import LlamaForCausalLM
from octavo_engine.models.mistral import MistralForCausalLM, MixtralForCausalLM
from octavo_engine.models.modern_bert import ModernBertModel
from octavo_engine.models.olmo import Olmo2ForCausalLM
from octavo_engine.models.phi import Phi3ForCausalLM
from octavo_engine.models.qwen import Qwen2ForCausalLM, Qwen2MoeForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM
from octavo_engine.models.raw_config import RawConfig
from octavo_engine.models.smollm3 import SmolLM3ForCausalLM

ARCHITECTURES: dict[str, type[Model]] = {
    "BertForMaskedLM": BertModel,
    "BertForSequenceClassification": BertModel,
    "BertModel": BertModel,
    "DeepseekV2ForCausalLM": DeepseekV2ForCausalLM,
    "DeepseekV3ForCausalLM": DeepseekV3ForCausalLM,
    "Gemma2ForCausalLM": Gemma2ForCausalLM,
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "GptOssForCausalLM": GptOssForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "MixtralForCausalLM": MixtralForCausalLM,
    "ModernBertForMaskedLM": ModernBertModel,
    "ModernBertForSequenceClassification": ModernBertModel,
    "ModernBertModel": ModernBertModel,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen2MoeForCausalLM": Qwen2MoeForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "RobertaForSequenceClassification": RobertaModel,
    "RobertaModel": RobertaModel,
    "SmolLM3ForCausalLM": SmolLM3ForCausalLM,
    "XLMRobertaForSequenceClassification": RobertaModel,
    "XLMRobertaModel": RobertaModel,
}


def find_architecture(raw: RawConfig) -> tuple[str, type[Model]]:
    """(name, class) of the first architecture the configuration names that is known here.

    A decoder without its head (`Qwen3Model`), or with a classifier's instead (`Qwen3ForSequenceClassification`), is run
    by the class of the one with it.
    """
    names = raw.texts("architectures", ())
    for name in names:
        headed = name.removesuffix("Model").removesuffix(SUFFIX) + "ForCausalLM"
        for known in (name, headed):
            if known in ARCHITECTURES:
                return name, ARCHITECTURES[known]
    found = ", ".join(names) if names else "none named"
    raise ModelLoadError(
        f"{raw.origin}: architectures: {found}: not supported; known are {', '.join(sorted(ARCHITECTURES))}"
    )

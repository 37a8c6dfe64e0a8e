"""Text encoders and the prefix of their body's tensors.

`base_model_prefix` of the classes of transformers that have both a masked-LM and a sequence-classification
head, kept as data so that fusing needs no transformers; a test compares it with the installed version.
"""

from collections.abc import Mapping

BODY_PREFIXES: Mapping[str, str] = {
    "albert": "albert",
    "bert": "bert",
    "big_bird": "bert",
    "camembert": "roberta",
    "convbert": "convbert",
    "data2vec-text": "data2vec_text",
    "deberta": "deberta",
    "deberta-v2": "deberta",
    "distilbert": "distilbert",
    "electra": "electra",
    "ernie": "ernie",
    "esm": "esm",
    "eurobert": "model",
    "flaubert": "transformer",
    "fnet": "fnet",
    "funnel": "funnel",
    "gte": "gte",
    "ibert": "ibert",
    "jina_embeddings_v3": "roberta",
    "longformer": "longformer",
    "luke": "luke",
    "megatron-bert": "bert",
    "mobilebert": "mobilebert",
    "modernbert": "model",
    "mpnet": "mpnet",
    "mra": "mra",
    "nomic_bert": "nomic_bert",
    "nystromformer": "nystromformer",
    "reformer": "reformer",
    "rembert": "rembert",
    "roberta": "roberta",
    "roberta-prelayernorm": "roberta_prelayernorm",
    "roc_bert": "roc_bert",
    "roformer": "roformer",
    "squeezebert": "transformer",
    "xlm": "transformer",
    "xlm-roberta": "roberta",
    "xlm-roberta-xl": "roberta",
    "xmod": "roberta",
    "yoso": "yoso",
}

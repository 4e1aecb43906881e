"""The language model. Signatures that trainers, evaluations and generation build on:

    config = ModelConfig(vocab_size=512, num_layers=4, model_dim=256, ...)   # or from_dict(mapping)
    model = LanguageModel(config)
    params = model.init(key, tokens_BT)['params']
    variables = {'params': params}

    logits_BTS = model.apply(variables, tokens_BT, segment_ids=ids_BT)             # float32
    loss_sum, weight_sum = model.apply(
      variables, tokens_BT, targets_BT, mask=mask_BT, segment_ids=ids_BT, method='loss')
    nll_BT, correct_BT = model.apply(
      variables, tokens_BT, targets_BT, segment_ids=ids_BT, method='score')  # cache=: and a cache

    cache = model.init_cache(batch_size, max_length)                 # no parameters needed
    logits_BTS, cache = model.apply(variables, tokens_BT, cache=cache)
    logits_BS, cache = model.apply(variables, tokens_BT, None, cache, method='next_logits')

    count_parameters(config)                                          # abstract, costs nothing
    PRESETS['rdn_1p5b']                                               # the paper's, as ModelConfig

Parameters: 'embedding' [S, D], 'head' [D, S] unless tied, 'final_norm', and 'blocks', whose leaves
have a leading axis num_layers / len(pattern): 'block_0' .. hold 'mixer_norm', 'mixer', 'ffn_norm'
and 'ffn' ('gate_proj', 'up_proj', 'down_proj'). In 'mixer', matrices are named '*_proj'
[inputs, outputs], convolutions '*_conv' [W, channels]; 'A_log', 'dt_bias', 'norm_scale' and
'skip_scale' are vectors, as is the 'scale' of every norm.
"""

from rla_jax.models.config import ModelConfig
from rla_jax.models.language_model import LanguageModel, count_parameters
from rla_jax.models.loss import TokenScores
from rla_jax.models.presets import PRESETS

__all__ = ['LanguageModel', 'PRESETS', 'ModelConfig', 'TokenScores', 'count_parameters']

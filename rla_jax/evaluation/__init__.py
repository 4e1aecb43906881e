"""Evaluations of trained models, from perplexity to the harness's benchmarks.

    from rla_jax.evaluation import Settings, run_suites

    settings = Settings(data_dir='data')
    results, skipped = run_suites('runs/mine', ['perplexity', 'commonsense'], 'results', settings)

Or from the command line: `experiments/evaluate.py --suite=...`; with all the flags of the language
model evaluation harness: `python -m rla_jax.evaluation.lm_eval`. Sets are read from a folder
(`records`); what is absent is named, skipped and never counted.

What the suites are made of works on any `LanguageModel` with parameters:

    scorer = Scorer(model, params)
    scorer.score(sequences)                          # -ln p of every token, any lengths
    text_loss(scorer, tokenizer, [Text('...')])      # perplexities, bits per byte, by position
    log_likelihoods(scorer, bos_id, pairs)           # of continuations behind contexts
"""

from rla_jax.evaluation.likelihood import Likelihood, encode_pair, log_likelihoods
from rla_jax.evaluation.perplexity import PositionLoss, Text, TextLoss, text_loss
from rla_jax.evaluation.results import Result
from rla_jax.evaluation.run import Settings
from rla_jax.evaluation.scorer import Scorer, Scores
from rla_jax.evaluation.suites import SUITES, run_suites

__all__ = [
  'Likelihood',
  'PositionLoss',
  'Result',
  'SUITES',
  'Scorer',
  'Scores',
  'Settings',
  'Text',
  'TextLoss',
  'encode_pair',
  'log_likelihoods',
  'run_suites',
  'text_loss',
]

"""WikiText-2 as the published word perplexities have it.

The model reads pages with their spacing restored; words and bytes are those of the page as it
stands in the set, so that the numbers do not depend on the tokenizer: words are the parts of
`re.split(r'\\s+', page)`.
"""

import os
import re

from rla_jax.evaluation import records
from rla_jax.evaluation.perplexity import Text

NAMES = ('wikitext2_raw_test', 'wikitext')

# What the set's tokenisation did to the text, undone in this order.
_RESTORED = (
  (r"s '", "s'"),
  (r"/' [0-9]/", r"/'[0-9]/"),
  *((f' @{re.escape(mark)}@ ', mark) for mark in '-,.'),
  *((f' {re.escape(mark)} ', f'{mark} ') for mark in ':;.!?,'),
  (r'\(\s*([^)]*?)\s*\)', r'(\1)'),
  (r'\[\s*([^\]]*?)\s*\]', r'[\1]'),
  (r'{\s*([^}]*?)\s*}', r'{\1}'),
  (r'"\s*([^"]*?)\s*"', r'"\1"'),
  (r"'\s*([^']*?)\s*'", r"'\1'"),
  (r'= = = =', '===='),
  (r'= = =', '==='),
  (r'= =', '=='),
  (f' {chr(176)} ', chr(176)),
  (r' \n', '\n'),
  (r'\n ', '\n'),
  (r' N ', ' 1 '),
  (r" 's", "'s"),
)


def read(path: str | os.PathLike) -> list[Text]:
  """The pages of a file with the column `page`.

  Raises:
    DataError: the file is missing, damaged, empty, or has other columns.
  """
  pages = [record['page'] for record in records.read(path, ['page'])]
  return [
    Text(restore_spacing(page), words=len(re.split(r'\s+', page)), bytes=len(page.encode()))
    for page in pages
  ]


def restore_spacing(page: str) -> str:
  """The page as text is written: no spaces before punctuation or inside brackets and quotes."""
  for pattern, replacement in _RESTORED:
    page = re.sub(pattern, replacement, page)
  return page

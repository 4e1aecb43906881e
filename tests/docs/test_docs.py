"""Every Python block of the documentation runs, in order, in one namespace a file."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r'^```python\n(.*?)^```', re.MULTILINE | re.DOTALL)
FILES = [path for path in (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))) if
         BLOCK.search(path.read_text(encoding='utf-8'))]  # fmt: skip


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.name)
def test_blocks_run(path):
  text = path.read_text(encoding='utf-8')
  namespace = {'__name__': path.stem}
  for match in BLOCK.finditer(text):
    # Blank lines in front give errors the line number of the file.
    line = text.count('\n', 0, match.start(1))
    exec(compile('\n' * line + match.group(1), str(path), 'exec'), namespace)


def test_the_guide_is_found():
  assert 'use_in_your_model.md' in [path.name for path in FILES]

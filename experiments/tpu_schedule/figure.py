"""Draws the totals: bundles a token and head beside the bound of the matrix unit."""

import pathlib


def draw(totals: list[dict], path: pathlib.Path) -> None:
  """bf16 heads of 128 for every topology; nothing where matplotlib or such rows are missing."""
  rows = [row for row in totals if row['dtype'] == 'bfloat16' and str(row['size']) == '128']
  try:
    import matplotlib.pyplot as plt
  except ImportError:
    print(f'no figure: matplotlib is not installed ({path.name})')
    return
  if not rows:
    return
  topologies = sorted({row['topology'] for row in rows})
  figure, axes = plt.subplots(
    2, len(topologies), figsize=(3.2 * len(topologies), 5), layout='constrained', squeeze=False,
    sharey='row',
  )  # fmt: skip
  for column, topology in enumerate(topologies):
    some = [row for row in rows if row['topology'] == topology]
    names = [row['rule'].upper() for row in some]
    for axis, direction in zip(axes[:, column], ('forward', 'backward')):
      axis.bar(names, [float(row[direction]) for row in some], color='#4477aa', label='schedule')
      least = [float(row[f'{direction}_bound']) for row in some]
      axis.bar(names, least, color='#ee6677', width=0.4, label='matrix-unit bound')
      axis.set(title=f'{topology.split(":")[0]} {direction}')
  axes[0, 0].margins(y=0.4)
  axes[0, 0].legend(loc='upper left', fontsize=8)
  figure.supylabel('bundles a token and head')
  figure.suptitle('bf16, K = V = 128: compiled, not run')
  figure.savefig(path, dpi=150)
  plt.close(figure)

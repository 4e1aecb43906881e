"""Figures of the speed suite: time and memory a token, against length."""

import pathlib


def draw(rows: list[dict], folder: pathlib.Path, hardware: str) -> None:
  """Writes one PNG a head size and direction: time and peak memory a token, against length."""
  import matplotlib

  matplotlib.use('agg')
  import matplotlib.pyplot as plt

  for size, direction in sorted({(r['size'], r['direction']) for r in rows}):
    chosen = [r for r in rows if (r['size'], r['direction']) == (size, direction)]
    if len({r['length'] for r in chosen}) < 2:
      continue
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), constrained_layout=True)
    names = sorted({(r['operation'], r['implementation']) for r in chosen})
    operations = sorted({operation for operation, _ in names})
    styles = {'triton': '-', 'chunked': ':', 'fla': '--', 'cudnn': '-'}
    for operation, implementation in names:
      line = [
        r for r in chosen if (r['operation'], r['implementation']) == (operation, implementation)
      ]
      line.sort(key=lambda r: r['length'])
      passes = ', two passes' if implementation == 'fla' and operation in ('rdn', 'rla') else ''
      style = {
        'color': f'C{operations.index(operation)}', 'linestyle': styles[implementation],
        'marker': 'o', 'markersize': 3, 'label': f'{operation} {implementation}{passes}',
      }  # fmt: skip
      lengths = [r['length'] for r in line]
      axes[0].loglog(lengths, [r['microseconds_per_token'] for r in line], **style)
      tokens = [r['batch'] * r['length'] for r in line]
      memory = [r['peak_bytes'] / 2**10 / n for r, n in zip(line, tokens, strict=True)]
      axes[1].semilogx(lengths, memory, **style)
    axes[0].set_ylabel('microseconds a token')
    axes[1].set_ylabel('peak memory, KiB a token')
    for axis in axes:
      axis.set_xlabel('tokens of a sequence')
      axis.set_xticks(ticks := sorted({r['length'] for r in chosen}), map(str, ticks))
      axis.minorticks_off()
      axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
      handles, labels, loc='outside lower center', ncols=5, fontsize=8, handlelength=3.5
    )
    figure.suptitle(f'{direction}, head size {size}, {hardware}', fontsize=10)
    figure.savefig(folder / f'speed_{direction}_{size}.png', dpi=130)
    plt.close(figure)

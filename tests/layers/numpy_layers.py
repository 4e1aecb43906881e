"""The named layers in float64 numpy, one token and one head at a time, for one sequence.

Written from the papers' equations, without the operators or the layers' code. `p` holds a layer's
parameters; x is [T, D]; sizes are read off the parameters.
"""

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def silu(x):
  return x * sigmoid(x)


def softplus(x):
  return np.logaddexp(0, x)


def unit(x):
  return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def rms(x, scale):
  return scale * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def conv(x, taps):
  """y_t = sum over the last W inputs."""
  width = len(taps)
  y = np.zeros_like(x)
  for t in range(len(x)):
    for j in range(width):
      if t - j >= 0:
        y[t] += taps[width - 1 - j] * x[t - j]
  return y


def rotate(x, base=10_000.0):
  """Complex rotation of the pairs (i, i + K/2) of x [T, H, K]."""
  T, _, K = x.shape
  angle = np.arange(T)[:, None] * base ** (-2 * np.arange(K // 2) / K)
  z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle)[:, None]
  return np.concatenate([z.real, z.imag], -1)


def split(x, heads):
  return x.reshape(len(x), heads, -1)


def short(p, x, name, heads, convolve=True):
  """Projection, convolution and SiLU."""
  return split(silu(conv(x @ p[f'{name}_proj'], p[f'{name}_conv'])), heads)


def inputs(p, x, heads, groups):
  """q, k, v of the layers with convolution and L2 norm; q over sqrt(K), q and k a value head."""
  q, k = unit(short(p, x, 'q', groups)), unit(short(p, x, 'k', groups))
  q, k = (np.repeat(a, heads // groups, axis=1) for a in (q, k))
  return q / np.sqrt(q.shape[-1]), k, short(p, x, 'v', heads)


def gated_output(p, x, o, activation=silu):
  """rms of each head, then the gate."""
  o = rms(o, p['norm_scale']).reshape(len(x), -1)
  if 'output_gate_proj' in p:
    o = o * activation(x @ p['output_gate_proj'])
  elif 'output_gate_up_proj' in p:
    o = o * activation(x @ p['output_gate_down_proj'] @ p['output_gate_up_proj'])
  return o @ p['o_proj']


def scalar_decay(p, x):
  return np.exp(-np.exp(p['A_log']) * softplus(x @ p['decay_proj'] + p['dt_bias']))


def residual_net(p, x, heads, groups, delta, clip=1.0):
  """Residual Delta Net (delta) and Residual Linear Attention."""
  q, k, v = inputs(p, x, heads, groups)
  alpha, beta, gamma = scalar_decay(p, x), sigmoid(x @ p['beta_proj']), sigmoid(x @ p['gamma_proj'])
  T, H, V = v.shape
  o = np.zeros((T, H, V))
  for h in range(H):
    S = R = np.zeros((k.shape[-1], V))
    for t in range(T):
      kt, a, b, g = k[t, h], alpha[t, h], beta[t, h], gamma[t, h]
      r = np.clip(v[t, h] - S.T @ kt, -clip, clip)
      keep_S = np.eye(len(kt)) - b * np.outer(kt, kt) if delta else 1
      keep_R = np.eye(len(kt)) - g * np.outer(kt, kt) if delta else 1
      old = S
      S = a * (keep_S @ S if delta else S) + b * np.outer(kt, v[t, h])
      R = a * (keep_R @ R if delta else R) + g * np.outer(kt, r)
      o[t, h] = a * old.T @ q[t, h] + g * R.T @ q[t, h]
  return gated_output(p, x, o)


def delta_nets(p, x, heads, groups, kind):
  """DeltaNet, Gated DeltaNet, Kimi Delta Attention, and two delta-rule states summed."""
  q, k, v = inputs(p, x, heads, groups)
  T, H, V = v.shape
  K = k.shape[-1]
  rates = [sigmoid(x @ p['beta_proj'])]
  if kind == 'two_state':
    rates.append(sigmoid(x @ p['gamma_proj']))
  alpha = np.ones((T, H, K))
  if kind in ('gdn', 'two_state'):
    alpha = alpha * scalar_decay(p, x)[..., None]
  if kind == 'kda':
    step = softplus(x @ p['decay_down_proj'] @ p['decay_up_proj'] + p['dt_bias'])
    alpha = np.exp(-np.exp(p['A_log'])[:, None] * split(step, H))
  o = np.zeros((T, H, V))
  for h in range(H):
    for rate in rates:
      S = np.zeros((K, V))
      for t in range(T):
        kt = k[t, h]
        S = alpha[t, h][:, None] * S
        S = S + rate[t, h] * np.outer(kt, v[t, h] - S.T @ kt)
        o[t, h] += S.T @ q[t, h]
  return gated_output(p, x, o, sigmoid if kind == 'kda' else silu)


def sgla(p, x, heads, groups):
  q, k, v = inputs(p, x, heads, groups)
  alpha, beta = scalar_decay(p, x), sigmoid(x @ p['beta_proj'])
  return gated_output(p, x, additive(q, k, beta[..., None] * v, alpha[..., None]))


def additive(q, k, v, alpha):
  """S_t = Diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t, as the explicit sum over the past."""
  o = np.zeros(v.shape)
  for h in range(v.shape[1]):
    for t in range(len(v)):
      weight = np.ones_like(alpha[0, h])
      for s in range(t, -1, -1):
        o[t, h] += (q[t, h] * weight * k[s, h]).sum() * v[s, h]
        weight = weight * alpha[s, h]
  return o


def retnet(p, x, heads, groups):
  q, k, v = (split(x @ p[f'{n}_proj'], h) for n, h in (('q', groups), ('k', groups), ('v', heads)))
  q, k = (np.repeat(rotate(a), heads // groups, axis=1) for a in (q, k))
  alpha = np.array([1 - 2.0 ** (-5 - h) for h in range(heads)])
  alpha = np.broadcast_to(alpha[None, :, None], (len(x), heads, 1))
  return gated_output(p, x, additive(q / np.sqrt(q.shape[-1]), k, v, alpha))


def gla(p, x, heads, groups):
  q, k, v = (split(x @ p[f'{n}_proj'], h) for n, h in (('q', groups), ('k', groups), ('v', heads)))
  q, k = (np.repeat(a, heads // groups, axis=1) for a in (q, k))
  alpha = sigmoid(x @ p['decay_down_proj'] @ p['decay_up_proj'] + p['dt_bias']) ** (1 / 16)
  return gated_output(p, x, additive(q / np.sqrt(q.shape[-1]), k, v, split(alpha, heads)))


def mamba2(p, x, heads, groups):
  q, k = (np.repeat(short(p, x, n, groups), heads // groups, axis=1) for n in 'qk')
  v = short(p, x, 'v', heads)
  step = softplus(x @ p['decay_proj'] + p['dt_bias'])
  alpha = np.exp(-np.exp(p['A_log']) * step)
  o = additive(q, k, step[..., None] * v, alpha[..., None])
  o = (o + p['skip_scale'][:, None] * v).reshape(len(x), -1)
  return rms(o * silu(x @ p['output_gate_proj']), p['norm_scale']) @ p['o_proj']


def attention(p, x, heads, groups, window=None):
  q, k, v = (split(x @ p[f'{n}_proj'], h) for n, h in (('q', heads), ('k', groups), ('v', groups)))
  q, k = rotate(q), rotate(k)
  k, v = (np.repeat(a, heads // groups, axis=1) for a in (k, v))
  o = np.zeros_like(q)
  for h in range(heads):
    for t in range(len(x)):
      past = range(0 if window is None else max(0, t - window + 1), t + 1)
      logits = np.array([q[t, h] @ k[s, h] for s in past]) / np.sqrt(q.shape[-1])
      weights = np.exp(logits - logits.max())
      o[t, h] = sum(w * v[s, h] for w, s in zip(weights / weights.sum(), past))
  return o.reshape(len(x), -1) @ p['o_proj']


def layer(name, p, x, heads, groups, window=None):
  """y [T, D] of a layer of the registry."""
  if name in ('rdn', 'rla'):
    return residual_net(p, x, heads, groups, delta=name == 'rdn')
  if name in ('delta_net', 'gdn', 'kda', 'two_state'):
    return delta_nets(p, x, heads, groups, name)
  if name == 'attention':
    return attention(p, x, heads, groups)
  if name == 'sliding_window_attention':
    return attention(p, x, heads, groups, window)
  if name == 'base_conv':
    return x + (conv(x, p['x_conv']) + p['x_bias']) * (x @ p['gate_proj'] + p['gate_bias'])
  if name == 'identity':
    return x
  return {'sgla': sgla, 'retnet': retnet, 'gla': gla, 'mamba2': mamba2}[name](p, x, heads, groups)

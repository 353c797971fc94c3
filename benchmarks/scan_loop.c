/* The selective scan, forward and backward, as one loop a channel: what a compiled loop takes.
   As an operator has to, the backward makes the states again.

   All arrays are float32 and dense: u, dt, z, dy, y (B, T, D); A (D, N); Bm, C (B, T, N);
   skip, bias (D). Gradients beside them; those of A, skip and bias are (B, ...), summed by the
   caller. dt goes through the softplus, y through the gate silu(z). N is at most 64. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One channel of one utterance: states h[1..frames] from h[0] = 0, decays and steps if wanted. */
static inline float advance(long n_states, float s, float x, const float *a, const float *B,
                            const float *C, const float *was, float *now, float *decay)
{
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (long n = 0; n < n_states; n++) {
        decay[n] = expf(s * a[n]);
        now[n] = decay[n] * was[n] + x * B[n];
        total += now[n] * C[n];
    }
    return total;
}

static inline float softplus(float x) { return x > 20 ? x : log1pf(expf(x)); }

void scan_forward(long batch, long frames, long channels, long states, const float *u,
                  const float *dt, const float *A, const float *Bm, const float *C,
                  const float *skip, const float *z, const float *bias, float *y)
{
#pragma omp parallel for
    for (long b = 0; b < batch; b++)
        for (long d = 0; d < channels; d++) {
            float h[64] = {0}, decay[64];
            for (long t = 0; t < frames; t++) {
                long i = (b * frames + t) * channels + d, k = (b * frames + t) * states;
                float s = softplus(dt[i] + bias[d]);
                float sum = advance(states, s, s * u[i], A + d * states, Bm + k, C + k, h, h, decay);
                y[i] = (sum + skip[d] * u[i]) * z[i] / (1 + expf(-z[i]));
            }
        }
}

void scan_backward(long batch, long frames, long channels, long states, const float *u,
                   const float *dt, const float *A, const float *Bm, const float *C,
                   const float *skip, const float *z, const float *bias, const float *dy, float *du,
                   float *ddt, float *dA, float *dB, float *dC, float *dskip, float *dz,
                   float *dbias)
{
#pragma omp parallel for
    for (long b = 0; b < batch; b++) {
        float *h = malloc(2 * (frames + 1) * states * sizeof(float)); /* h[0] is the start */
        float *decay = h + (frames + 1) * states;
        float *step = malloc(2 * frames * sizeof(float)), *sum = step + frames;
        const float *Bb = Bm + b * frames * states, *Cb = C + b * frames * states;
        float *dBb = dB + b * frames * states, *dCb = dC + b * frames * states;
        memset(dBb, 0, frames * states * sizeof(float));
        memset(dCb, 0, frames * states * sizeof(float));
        memset(h, 0, states * sizeof(float));
        for (long d = 0; d < channels; d++) {
            const float *a = A + d * states;
            for (long t = 0; t < frames; t++) {
                long i = (b * frames + t) * channels + d, k = t * states;
                step[t] = softplus(dt[i] + bias[d]);
                sum[t] = advance(states, step[t], step[t] * u[i], a, Bb + k, Cb + k, h + k,
                                 h + k + states, decay + k);
                sum[t] += skip[d] * u[i];
            }
            float g[64] = {0}, *da = dA + (b * channels + d) * states, dD = 0, db = 0;
            memset(da, 0, states * sizeof(float));
            for (long t = frames - 1; t >= 0; t--) {
                long i = (b * frames + t) * channels + d;
                float sigmoid = 1 / (1 + expf(-z[i])), gate = z[i] * sigmoid, s = step[t];
                float dsum = dy[i] * gate, x = s * u[i], ds = 0, dx = 0;
                float *now = h + (t + 1) * states, *was = h + t * states, *e = decay + t * states;
                dz[i] = dy[i] * sum[t] * (sigmoid + gate * (1 - sigmoid));
                dD += dsum * u[i];
#pragma omp simd reduction(+ : ds, dx)
                for (long n = 0; n < states; n++) {
                    float dh = g[n] + dsum * Cb[t * states + n];
                    float dlog = dh * was[n] * e[n];
                    dCb[t * states + n] += dsum * now[n];
                    dBb[t * states + n] += dh * x;
                    da[n] += dlog * s;
                    ds += dlog * a[n];
                    dx += dh * Bb[t * states + n];
                    g[n] = dh * e[n];
                }
                ds += dx * u[i];
                du[i] = dx * s + dsum * skip[d];
                ddt[i] = ds * (1 - expf(-s));
                db += ddt[i];
            }
            dskip[b * channels + d] = dD;
            dbias[b * channels + d] = db;
        }
        free(h);
        free(step);
    }
}

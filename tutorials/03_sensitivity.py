"""Measure how much each layer suffers from few bits, by itself, and see how well a far cheaper way predicts it.

Run it with `python tutorials/03_sensitivity.py`; it takes half a minute on two cores and needs no download.
"""

from mixdq_ao import calibrate, families
from mixdq_ao.pipelines import load_pipeline
from mixdq_ao.prompts import built_in_prompts
from mixdq_ao.sensitivity import rank_correlation, sensitivity

pipe = load_pipeline("tiny-sdxl")  # or the folder of any SDXL-like pipeline
prompts = built_in_prompts(8, scenes=True)
params = calibrate(pipe, prompts)

# Every layer at 2, 4 and 8 bits, predicted: one forward and backward for each prompt. The tables in the folder are what
# `mixdq-ao allocate` reads. A run that is stopped goes on where it was.
cheap = sensitivity(pipe, params, prompts[:2], "sensitivity-cheap", kinds=["weight"], cheap=True)
scores = cheap.scores["weight"]["sqnr"]
print(f"{len(scores)} layers in {cheap.seconds:.0f} s. The four that suffer most from 4 bits:")
for name in sorted(scores, key=lambda name: scores[name][4])[:4]:
    print(f"  {scores[name][4]:5.1f} dB  {name}")

# The same for every twelfth layer, measured: it alone is quantized, the UNet runs, the outputs are compared.
some = list(families.layers_of(pipe.unet))[::12]
full = sensitivity(pipe, params, prompts[:2], "sensitivity-full", kinds=["weight"], layers=some)
print(f"{len(some)} of them measured in {full.seconds:.0f} s")
print(f"rank correlation with the prediction: {rank_correlation(full.scores['weight']['sqnr'], scores):.3f}")

# Layers of the cross-attention and feed-forward kind change what is in the picture: SSIM of pictures tells that better
# than SQNR. A score above the noise floor, the floating model against itself in other batches, says nothing.
content = full.scores["weight"]["ssim"]
print(f"{len(content)} content layers, lowest SSIM at 2 bits: {min(s[2] for s in content.values()):.3f}")
print(f"noise floor: SQNR {full.noise_floor['sqnr']:.0f} dB, SSIM {full.noise_floor['ssim']:.6f}")

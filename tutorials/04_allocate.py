"""Give each layer its width under a budget: by group, over the ratio of both groups' budgets, or all at once.

Run it with `python tutorials/04_allocate.py`; it takes half a minute on two cores and needs no download.
"""

from mixdq_ao import calibrate
from mixdq_ao.allocate import by_group, front, joint, least_noise, plot_front, problem, sweep
from mixdq_ao.choose import choose
from mixdq_ao.pipelines import load_pipeline
from mixdq_ao.prompts import built_in_prompts
from mixdq_ao.sensitivity import sensitivity

pipe = load_pipeline("tiny-sdxl")  # or the folder of any SDXL-like pipeline
prompts = built_in_prompts(8, scenes=True)
params = calibrate(pipe, prompts)
tables = sensitivity(pipe, params, prompts[:2], "sensitivity", kinds=["weight"], cheap=True)

# Content layers are judged by SSIM and may have 2 bits, quality layers by SQNR and have 4 or 8.
scores = tables.scores["weight"]
p = problem(scores["ssim"], scores["sqnr"], tables.sizes["weight"])

# Mean bits of each group by hand, as upper edges: one exact 0/1 program a group.
plan = by_group(p, {"content": 3.5, "quality": 6.0})
print(f"by hand: {plan.mean_bits:.3f} mean bits, groups {plan.group_bits}")

# Mean bits of the whole: what share each group should have is not in the tables, so try many ratios.
points = sweep(p, budget=4.5)
print(f"the sweep: {len(points)} plans at 4.5 bits, {len(front(points))} of them on the Pareto front")
best = least_noise(points)
plot_front(points, "front.png", best)
print(f"least summed error energy: ratio {best.ratio:g}, {best.noise:.2e}")

# Both metrics on one scale, the relative error energy of the UNet output: one program for all layers.
together = joint(p, budget=4.5)
print(f"jointly: {together.mean_bits:.3f} mean bits, {together.noise:.2e}")

# Layers quantized together are not what each was alone: the pictures decide.
candidates = {"sweep": best.plan, "joint": together.plan}
choice = choose(pipe, params, candidates, built_in_prompts(4, scenes=True, held_out=True))
print(choice.reason)
choice.plan.write("plan.yaml")  # for MixDQConfig(params, weight_bits="plan.yaml")

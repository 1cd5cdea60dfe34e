"""Policy-gradient algorithms, one file each, by name: ``dreaming.algorithm``, ``consolidation.algorithm``.

What sets one apart: which advantage a reward becomes, what its surrogate does with the ratio to
the policy that sampled, and over what the mean is taken.

    name                 advantage                  ratio                       mean over
    grpo                 group, over its deviation  token, clipped              sequences
    dr_grpo              group                      token, clipped              sequences, / limit
    dapo                 group, over its deviation  token, clipped, higher up   tokens
    dapo_unscaled        group                      token, clipped, higher up   tokens
    gspo                 group, over its deviation  sequence's root, clipped    sequences
    cispo                group, over its deviation  token, capped, no gradient  tokens
    rloo                 leave one out              sequence, clipped           sequences
    reinforce            batch                      none                        tokens
    reinforce_plus_plus  batch, over its deviation  token, clipped              tokens
    ppo                  critic, GAE                token, clipped              tokens
    rest_em              1 above the threshold      none                        tokens
"""

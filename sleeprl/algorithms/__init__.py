"""Policy-gradient algorithms, one file each, by name: ``dreaming.algorithm``, ``consolidation.algorithm``.

What sets one apart: which advantage a reward becomes, what its surrogate does with the ratio to
the policy that sampled, and over what the mean is taken. The last three columns are its flags
(``base.Algorithm``), and a test holds them to the classes.

    name                 advantage                  ratio                       mean over  group  critic
    grpo                 group, over its deviation  token, clipped              sequence   yes    no
    dr_grpo              group                      token, clipped              constant   yes    no
    dapo                 group, over its deviation  token, clipped, higher up   token      yes    no
    dapo_unscaled        group                      token, clipped, higher up   token      yes    no
    gspo                 group, over its deviation  sequence's root, clipped    sequence   yes    no
    cispo                group, over its deviation  token, capped, no gradient  token      yes    no
    rloo                 leave one out              sequence, clipped           sequence   yes    no
    reinforce            batch                      none                        token      no     no
    reinforce_plus_plus  batch, over its deviation  token, clipped              token      no     no
    ppo                  critic, GAE                token, clipped              token      no     yes
    rest_em              1 above the threshold      none                        token      no     no
"""

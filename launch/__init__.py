"""Running verbs on this machine or on a Slurm cluster: `python -m launch VERB CONFIG [key=value ...] --on slurm`.

    jobs.submit(verb, config, keys, ...) -> Job     check, snapshot the code, submit through submitit
    jobs.poll(jobs, Poller()) -> states             one call to Slurm for all of them
    task.Task                                       what each rank of a job runs: environment, signals, the verb
    ending                                          after all ranks: why it ended, and whether it goes back to the queue

Sits on top of `hpc_neuro`, which never imports it.
"""

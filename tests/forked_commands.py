"""The commands in processes that are forked from one which has imported them, as that takes longer
than what they do. Reads a job from each line of standard input, and answers with its status.

A job: the command, its arguments, the folder where it runs, where its two outputs go (a file,
"closed", or "a pipe" whose reader has gone), and what else is special there.
"""

import json
import os
import resource
import signal
import sys
import warnings

import jax

from hamux import cli


def put(fd, stream, where):
    "Let a file descriptor be what a shell would make of it: the stream of Python for it, or None."
    os.close(fd)
    if where == "closed": return None
    if where == "a pipe":
        reader, new = os.pipe()
        os.close(reader)
    else:
        new = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(new, fd)
    if new != fd: os.close(new)
    return stream


def become(command, argv, folder, out, err, gone=False, caches=None, limits=()):
    "Run a command as if Python had been started for it."
    signal.alarm(120)
    os.chdir(folder)
    if gone: # what the command stands in
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = put(1, sys.stdout, out), put(2, sys.stderr, err)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    if caches: # in the user's folder, and not where a run of tests has them
        os.environ["XDG_CACHE_HOME"] = caches
        jax.config.update("jax_compilation_cache_dir", None)
    for name, most in limits: resource.setrlimit(getattr(resource, name), (most, most))
    sys.exit(getattr(cli, command)(argv))


warnings.simplefilter("ignore") # of forks: no thread has been started here
for line in sys.stdin:
    child = os.fork()
    if not child:
        warnings.resetwarnings()
        become(**json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

"""The verbs, a file each: options, what a line of it runs, and the `Verb`. `cli.VERBS` lists them.

A verb imports what it runs inside its function, so that a wrong line is answered before JAX starts.
"""

"""Checks objects against the schemas of one version of Kubernetes, strictly: a field that the version does not have is an error.

    chart_schema.py VERSION < objects.json

The schemas are those of the package `kubernetes-validate`: its newest release has the newest, an old one, in a folder of its own beside
this interpreter's environment, those of Kubernetes 1.20. Only their files are used.
"""

import functools
import importlib.util
import json
import pathlib
import sys

import jsonschema
import referencing
import referencing.jsonschema


def folders():
    """Every folder of schemas, by version."""
    newest = pathlib.Path(importlib.util.find_spec("kubernetes_validate").origin).parent
    old = pathlib.Path(sys.prefix) / "schemas-1.20" / "kubernetes_validate"
    found = {}
    for package in (newest, old):
        for folder in sorted((package / "kubernetes-json-schema").glob("v*-local-strict")):
            version = folder.name.split("-")[0][1:]
            found[".".join(version.split(".")[:2])] = folder
    return found


@functools.cache
def resource(path):
    # Drafts differ in nothing that these schemas use.
    return referencing.Resource.from_contents(json.loads(path.read_text()), referencing.jsonschema.DRAFT7)


def validator(folder, kind, api_version):
    group, _, version = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.split(".")[0], version) if part)
    path = folder / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{folder.name} has no {kind} of {api_version}")

    registry = referencing.Registry(retrieve=lambda uri: resource(folder / uri.rsplit("/", 1)[-1]))
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "$id": f"file:///{path.name}", "$ref": path.name}
    return jsonschema.Draft7Validator(schema, registry=registry)


def main():
    wanted, found = sys.argv[1], folders()
    version = max(found, key=lambda version: [int(part) for part in version.split(".")]) if wanted == "newest" else wanted
    folder, bad = found[version], []
    objects = json.load(sys.stdin)
    for one in objects:
        for error in validator(folder, one["kind"], one["apiVersion"]).iter_errors(one):
            where = ".".join(str(part) for part in error.absolute_path)
            bad.append(f"{one['kind']} {one['metadata']['name']}: {where}: {error.message[:300]}")
    if bad:
        raise SystemExit("\n".join(bad))
    print(f"{len(objects)} objects fit Kubernetes {version}")


main()

//! What a request is, in Kubernetes' words.

use http::{Method, Uri};

/// A request of the API server. Both words are of fixed sets, for labels of metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Call {
    pub(super) verb: &'static str,
    pub(super) resource: &'static str,
}

impl Call {
    /// What a request asks for.
    pub(super) fn of(method: &Method, uri: &Uri) -> Self {
        let mut parts = uri.path().split('/').filter(|part| !part.is_empty()).peekable();
        // `/api/v1/…` and `/apis/GROUP/VERSION/…`; what is in neither has no namespace and no name.
        let before = match parts.next() {
            Some("api") => 1,
            Some("apis") => 2,
            Some("version") => return Self { verb: "get", resource: "version" },
            _ => return Self { verb: verb(method, uri, true), resource: "other" },
        };
        let mut parts = parts.skip(before).peekable();
        if parts.peek() == Some(&"namespaces") {
            parts.next();
            parts.next();
        }
        let resource = match parts.next() {
            Some("jobs") => "jobs",
            Some("pods") => "pods",
            Some("secrets") => "secrets",
            _ => "other",
        };
        Self { verb: verb(method, uri, parts.next().is_some()), resource }
    }

    /// Whether it makes something.
    pub(super) fn creates(self) -> bool {
        self.verb == "create"
    }
}

fn verb(method: &Method, uri: &Uri, named: bool) -> &'static str {
    let watches = || {
        let mut pairs = uri.query().unwrap_or_default().split('&');
        pairs.any(|pair| matches!(pair, "watch=true" | "watch=1" | "watch"))
    };
    match *method {
        Method::POST => "create",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::GET if watches() => "watch",
        Method::GET if named => "get",
        Method::GET => "list",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_told_apart_as_kubernetes_does() {
        for (method, uri, verb, resource) in [
            (Method::POST, "/apis/batch/v1/namespaces/n/jobs?fieldManager=x", "create", "jobs"),
            (Method::GET, "/apis/batch/v1/namespaces/n/jobs/a", "get", "jobs"),
            (Method::GET, "/apis/batch/v1/namespaces/n/jobs?labelSelector=a%3Db", "list", "jobs"),
            (Method::GET, "/api/v1/namespaces/n/pods?&watch=true&timeoutSeconds=290", "watch", "pods"),
            (Method::PATCH, "/apis/batch/v1/namespaces/n/jobs/a?", "patch", "jobs"),
            (Method::DELETE, "/api/v1/namespaces/n/pods/a", "delete", "pods"),
            (Method::POST, "/api/v1/namespaces/n/secrets", "create", "secrets"),
            (Method::GET, "/version", "get", "version"),
            (Method::GET, "/api/v1/nodes", "list", "other"),
            (Method::GET, "/readyz", "get", "other"),
            // A namespace that is called as something else is.
            (Method::GET, "/api/v1/namespaces/pods/secrets/jobs", "get", "secrets"),
        ] {
            let uri: Uri = uri.parse().unwrap();
            assert_eq!(Call::of(&method, &uri), Call { verb, resource }, "{method} {uri}");
        }
    }
}

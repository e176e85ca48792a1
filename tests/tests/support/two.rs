//! A service with two backends.

use runner_tests::{
    backend::dind::{self, IMAGE},
    docker::{Engine, TestImage},
    service::Service,
};

/// `dind`, the default, on an engine; and `cluster`, which stands for any other.
pub async fn start(engine: &Engine) -> Service {
    TestImage::busybox().load(&engine.connect(), IMAGE).await;
    let agent = dind::config(engine).agent.expect("the harness names the agent");
    let backends = format!(
        "[{{ kind = 'dind', name = 'dind', host = '{}', agent = '{}', default_image = '{IMAGE}', slots = 4 }}, \
         {{ kind = 'local', name = 'cluster', slots = 4 }}]",
        engine.host(),
        agent.display()
    );
    Service::start_with(&[("RUNNER_BACKENDS", &backends), ("RUNNER_DEFAULT_BACKEND", "dind")]).await
}

//! 4 GiB in and 4 GiB out of a run, over S3, each checked by its SHA-256, in little memory of the service.

use runner_tests::{
    objects::{Dialect, StoreServer, sha256_of_zeros},
    proc,
    service::{Service, within},
};
use worker_client::{Client, RunSpec, proto};

const SIZE: u64 = 4 << 30;
/// What the service may have more than when it is idle, in bytes.
const EXTRA: u64 = 64 << 20;

/// Takes an object of this size as an input, and stores an output of the same.
async fn through(client: &Client, bucket: &StoreServer, size: u64) -> String {
    let key = format!("uploads/default/zeros-{size}/files/a");
    bucket.bucket().put_zeros(&format!("big/{key}"), size);
    let sha256 = sha256_of_zeros(size);
    // What it stores is as large as what it got; a hole takes no disk, and is read as any other bytes.
    let program = "truncate -s $(stat -c %s /inputs/a) /outputs/a";
    let input = proto::Input {
        path: "/inputs/a".to_owned(),
        source: Some(proto::input::Source::Uri(format!("artifact:{key}"))),
        sha256: sha256.clone(),
        ..proto::Input::default()
    };
    let spec = RunSpec::command(["sh", "-c", program]).input_spec(input).output("/outputs/a");
    let run = client.run(spec).await.expect("the run is accepted");
    let waiting = tokio::time::timeout(std::time::Duration::from_secs(600), run.wait());
    let end = waiting.await.expect("the run ends").expect("the stream goes on");
    assert!(end.succeeded(), "{end:?}");
    let entry = &end.outputs().expect("a manifest").entries[0];
    assert_eq!((entry.size, &entry.sha256), (size, &sha256));
    run.id().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "the measured number is what the test is also for")]
async fn four_gibibytes_go_in_and_out_in_less_than_64_mib_of_the_service_s_memory() {
    let bucket = StoreServer::start(Dialect::S3);
    let settings = bucket.settings("big");
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let service = Service::start_with(&settings).await;
    let client = service.client();
    // Its code is in memory once it was used; that is no memory of a transfer.
    let small = through(&client, &bucket, 1 << 20).await;
    within("the first run's end", service.assert_clean(&[&small])).await;
    let idle = proc::resident_bytes(service.pid()).expect("the service lives");
    proc::forget_peak(service.pid()).expect("the peak begins anew");
    let run = through(&client, &bucket, SIZE).await;
    let peak = proc::peak_bytes(service.pid()).expect("the service lives");
    println!("idle {} MiB, at most {} MiB", idle >> 20, peak >> 20);
    assert!(peak <= idle + EXTRA, "from {idle} to {peak} bytes");
    assert_eq!(bucket.bucket().uploads(), [""; 0]);
    service.assert_clean(&[&run]).await;
}

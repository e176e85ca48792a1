//! Certificates of one test: an authority, a server on the loopback, a client.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// What a client shows, and what it trusts: paths of PEM files, named as Docker's own clients expect them in a directory.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    /// The authority that signed the server's certificate.
    pub ca: PathBuf,
    /// The client's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

fn openssl(dir: &Path, args: &[&str]) -> Result<(), String> {
    let output = Command::new("openssl").current_dir(dir).args(args).output();
    let output = output.map_err(|error| format!("start openssl: {error}"))?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("openssl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr)))
    }
}

/// Makes them in `dir`: an authority in `ca.pem`, `server.pem` and `server-key.pem` for 127.0.0.1 and `localhost`, `cert.pem`
/// and `key.pem` for the client.
///
/// # Errors
/// What openssl says.
pub(crate) fn make(dir: &Path) -> Result<ClientCertificate, String> {
    fs::create_dir(dir).map_err(|error| format!("make {}: {error}", dir.display()))?;
    let key =
        |name: &str| ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", name].map(str::to_owned);
    for name in ["ca-key.pem", "server-key.pem", "key.pem"] {
        let args = key(name);
        openssl(dir, &args.each_ref().map(String::as_str))?;
    }
    let authority = [
        "req",
        "-x509",
        "-new",
        "-key",
        "ca-key.pem",
        "-subj",
        "/CN=runner tests",
        "-days",
        "2",
        "-out",
        "ca.pem",
        "-addext",
        "keyUsage=critical,keyCertSign,cRLSign",
    ];
    openssl(dir, &authority)?;
    for (name, key, extension) in [
        (
            "server",
            "server-key.pem",
            "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n",
        ),
        ("cert", "key.pem", "extendedKeyUsage=clientAuth\n"),
    ] {
        let file = |suffix: &str| format!("{name}{suffix}");
        fs::write(dir.join(file(".ext")), extension).map_err(|error| format!("write extensions: {error}"))?;
        let subject = format!("/CN={name}");
        openssl(dir, &["req", "-new", "-key", key, "-subj", &subject, "-out", &file(".csr")])?;
        let (request, extensions, certificate) = (file(".csr"), file(".ext"), file(".pem"));
        openssl(
            dir,
            &[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                "ca.pem",
                "-CAkey",
                "ca-key.pem",
                "-CAcreateserial",
                "-days",
                "2",
                "-extfile",
                &extensions,
                "-out",
                &certificate,
            ],
        )?;
    }
    Ok(ClientCertificate { ca: dir.join("ca.pem"), cert: dir.join("cert.pem"), key: dir.join("key.pem") })
}

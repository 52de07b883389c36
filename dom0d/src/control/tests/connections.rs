//! The socket and its connections: who may connect, and for how long whoever says or reads nothing is kept.

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use super::super::connection;
use super::super::socket::ListenError;
use super::*;

#[tokio::test]
async fn the_socket_is_root_s_alone_and_goes_with_the_daemon() {
    let directory = directory();
    let path = directory.join("run").join("control.sock");
    let socket = ControlSocket::listen(&path).unwrap();
    let mode = |path: &Path| std::fs::symlink_metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&path) & 0o7777, 0o600);
    assert_eq!(mode(path.parent().unwrap()) & 0o7777, 0o750);

    let second = ControlSocket::listen(&path).map(drop).unwrap_err();
    assert!(matches!(second, ListenError::Taken { .. }), "{second}");
    assert!(path.exists(), "the first daemon's socket is left alone");

    drop(socket);
    assert!(!path.exists());
    std::fs::remove_dir_all(directory).unwrap();
}

#[tokio::test]
async fn a_dead_daemon_s_socket_is_replaced_and_nothing_else_is() {
    let directory = directory();
    std::fs::create_dir(&directory).unwrap();
    let path = directory.join("control.sock");
    // What a killed daemon leaves: a socket that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let first = ControlSocket::listen(&path).unwrap();

    // A successor's socket survives the predecessor's end.
    std::fs::remove_file(&path).unwrap();
    let second = ControlSocket::listen(&path).unwrap();
    drop(first);
    let left = std::fs::symlink_metadata(&path).unwrap();
    assert!(left.file_type().is_socket());
    drop(second);

    std::fs::write(&path, "precious").unwrap();
    let error = ControlSocket::listen(&path).map(drop).unwrap_err();
    assert!(matches!(error, ListenError::NoSocket { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_dir_all(directory).unwrap();
}

/// Reads until the server has ended the connection; how long that took.
async fn ended(stream: &mut UnixStream) -> (Duration, Vec<u8>) {
    let begun = tokio::time::Instant::now();
    let mut said = Vec::new();
    let limit = 2 * connection::HEAD_TIME + Duration::from_secs(5);
    // A reset is an end, too.
    let _ = tokio::time::timeout(limit, stream.read_to_end(&mut said)).await.expect("held for ever");
    (begun.elapsed(), said)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_nothing_or_half_of_it_is_not_waited_for_long() {
    let daemon = Daemon::start();
    let mut whole = b"GET /livez HTTP/1.1\r\nhost: dom0\r\n\r\n".to_vec();
    let half = whole[..20].to_vec();
    let after = [whole.clone(), half.clone()].concat();
    whole.truncate(whole.len() - 2);
    let post =
        b"POST /v1/services/redis/detach HTTP/1.1\r\nhost: dom0\r\ncontent-length: 99\r\n\r\n{".to_vec();
    let get = b"GET /livez HTTP/1.1\r\nhost: dom0\r\ncontent-length: 99\r\n\r\n".to_vec();
    let chunked = b"GET /livez HTTP/1.1\r\nhost: dom0\r\ntransfer-encoding: chunked\r\n\r\n5\r\n".to_vec();
    let answered = b"GET /livez HTTP/1.1\r\nhost: dom0\r\n\r\n".to_vec();
    let mut tasks = tokio::task::JoinSet::new();
    for said in [Vec::new(), half, whole, after, post, get, chunked, answered] {
        let socket = daemon.socket();
        tasks.spawn(async move {
            let mut stream = UnixStream::connect(socket).await.unwrap();
            stream.write_all(&said).await.unwrap();
            (String::from_utf8_lossy(&said).into_owned(), ended(&mut stream).await.0)
        });
    }
    while let Some(task) = tasks.join_next().await {
        let (said, took) = task.unwrap();
        assert!(
            took < connection::HEAD_TIME + Duration::from_secs(3),
            "{said:?} held a connection for {took:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn however_many_connect_and_say_nothing_others_are_answered() {
    let daemon = Daemon::start();
    let mut silent = Vec::new();
    for _ in 0..connection::CONNECTIONS {
        let mut stream = UnixStream::connect(daemon.socket()).await.unwrap();
        stream.write_all(b"GET /v1/sta").await.unwrap();
        silent.push(stream);
    }
    let begun = tokio::time::Instant::now();
    let mut later = UnixStream::connect(daemon.socket()).await.unwrap();
    later.write_all(b"GET /livez HTTP/1.1\r\nhost: dom0\r\nconnection: close\r\n\r\n").await.unwrap();
    let (_, said) = ended(&mut later).await;
    assert!(said.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&said));
    assert!(begun.elapsed() > connection::HEAD_TIME / 2, "connections have no limit");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_what_it_asks_for_is_let_go() {
    let daemon = Daemon::start();
    let stream = UnixStream::connect(daemon.socket()).await.unwrap();
    let (_unread, mut writer) = stream.into_split();
    let until = tokio::time::Instant::now() + connection::READ_TIME + Duration::from_secs(8);
    // Until dom0d reads no more, having to wait with its answers, and then for the end.
    let asking =
        async { while writer.write_all(b"GET /v1/status HTTP/1.1\r\nhost: dom0\r\n\r\n").await.is_ok() {} };
    tokio::time::timeout_at(until, asking).await.expect("it is kept for ever");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_on_its_directory_keeps_no_daemon_from_listening() {
    let directory = directory();
    std::fs::create_dir_all(&directory).unwrap();
    let holder = std::fs::File::open(&directory).unwrap();
    holder.lock().unwrap();
    let path = directory.join("control.sock");
    let listening = tokio::task::spawn_blocking(move || ControlSocket::listen(&path).map(drop));
    tokio::time::timeout(Duration::from_secs(5), listening)
        .await
        .expect("waits for the lock")
        .unwrap()
        .unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
}

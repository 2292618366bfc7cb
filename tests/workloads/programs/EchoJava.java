// Sends back what it gets; every message is handled by another of 24 threads, and a scheduled one lets it go.
//
// java EchoJava.java PORT ADDRESS...
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.Arrays;
import java.util.concurrent.CyclicBarrier;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;

public class EchoJava {
    static final int WORKERS = 24;
    static final ExecutorService pool = Executors.newFixedThreadPool(WORKERS);
    static final ScheduledExecutorService later = Executors.newScheduledThreadPool(2);

    static byte[] work(byte[] data) {
        byte[][] garbage = new byte[64][]; // for the collector
        for (int i = 0; i < garbage.length; i++) garbage[i] = Arrays.copyOf(data, 4096);
        return Arrays.copyOf(garbage[63], data.length);
    }

    static void serve(Socket peer) {
        try (peer) {
            peer.setTcpNoDelay(true);
            InputStream in = peer.getInputStream();
            OutputStream out = peer.getOutputStream();
            byte[] buffer = new byte[65536];
            for (int n; (n = in.read(buffer)) > 0; ) {
                byte[] data = Arrays.copyOf(buffer, n);
                Future<byte[]> answer = pool.submit(() -> work(data));
                later.schedule(() -> 0, 1, TimeUnit.MILLISECONDS).get();
                out.write(answer.get());
            }
        } catch (Exception error) {
            System.err.println(error);
        }
    }

    public static void main(String[] args) throws Exception {
        CyclicBarrier all = new CyclicBarrier(WORKERS + 1);
        for (int i = 0; i < WORKERS; i++) pool.submit(() -> all.await()); // so that every thread exists
        all.await();
        for (int i = 1; i < args.length; i++) {
            ServerSocket listener = new ServerSocket(Integer.parseInt(args[0]), 128, InetAddress.getByName(args[i]));
            new Thread(() -> {
                while (true) {
                    try {
                        Socket peer = listener.accept();
                        new Thread(() -> serve(peer)).start();
                    } catch (Exception error) {
                        System.err.println(error);
                        System.exit(1);
                    }
                }
            }).start();
        }
    }
}
